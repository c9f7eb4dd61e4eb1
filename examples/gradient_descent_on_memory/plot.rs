//! Loss curves on a logarithmic axis.

const WIDTH: usize = 64;
/// From 10^0 down to 10^-3.
const DECADES: usize = 3;
const ROWS_PER_DECADE: usize = 3;

/// Both curves in one picture; the filled one lies on top.
pub(crate) fn plot(filled: &[f64], hollow: &[f64]) -> String {
    let mut rows = vec![vec![' '; WIDTH]; DECADES * ROWS_PER_DECADE + 1];
    for (mark, losses) in [('○', hollow), ('●', filled)] {
        for (column, row) in heights(losses).into_iter().enumerate() {
            rows[row][column] = mark;
        }
    }
    let line = |(row, cells): (usize, Vec<char>)| {
        let label = match row % ROWS_PER_DECADE {
            0 => format!("{}", 0.1f64.powi((row / ROWS_PER_DECADE) as i32) as f32),
            _ => String::new(),
        };
        format!("  {label:>6} │{}\n", cells.into_iter().collect::<String>().trim_end())
    };
    let curves: String = rows.into_iter().enumerate().map(line).collect();
    format!("{curves}         └{}\n", "─".repeat(WIDTH))
}

/// The row of every column, 0 at the top: the geometric mean of its share of the losses.
fn heights(losses: &[f64]) -> [usize; WIDTH] {
    std::array::from_fn(|column| {
        let from = column * losses.len() / WIDTH;
        let to = ((column + 1) * losses.len() / WIDTH).max(from + 1);
        let mean = losses[from..to].iter().map(|loss| loss.log10()).sum::<f64>() / (to - from) as f64;
        // From float to integer a cast saturates: what is above the axis lands on its top, as does a NaN.
        let row = (-mean * ROWS_PER_DECADE as f64).round() as usize;
        row.min(DECADES * ROWS_PER_DECADE)
    })
}
