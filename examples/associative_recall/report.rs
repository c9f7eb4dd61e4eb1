//! Bars and percentages.

/// A percentage with a bar of four cells.
pub(crate) fn cell(fraction: f64) -> String {
    const EIGHTHS: [&str; 8] = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"];
    let eighths = (fraction * 32.0).round() as usize;
    let bar = "█".repeat(eighths / 8) + EIGHTHS[eighths % 8];
    format!(" {bar:<4}{:>4.0}%", fraction * 100.0)
}

/// One line of a table.
pub(crate) fn row(name: &str, cells: &[f64]) -> String {
    let cells: String = cells.iter().map(|&fraction| cell(fraction)).collect();
    format!("  {name:<24}{cells}\n")
}

/// The heading of a table of loads.
pub(crate) fn heading(title: &str, loads: &[f64]) -> String {
    let loads: String = loads.iter().map(|load| format!(" {load:>9}")).collect();
    format!("\n{title}\n  {:<24}{}\n", "pairs per key dimension", loads.split_at(1).1)
}
