//! The tables, the words around them, and the claims that they support.

use delta_rule::Rule;

use crate::args::Result;
use crate::claims::Claim;
use crate::compare::relative_error;
use crate::engine::Engine;
use crate::recall::{Schedule, Task, VALUE_DIM};
use crate::report::{heading, row};
use crate::rng::Rng;
use crate::settings::Settings;
use crate::swaps::{self, Swaps};
use crate::terminal::print;

const LOADS: [f64; 6] = [0.25, 0.5, 0.75, 1.0, 1.5, 2.0];
const HALF: usize = 1;
const DOUBLE: usize = 5;
const LINEAR: &str = "linear attention";
const RULES: [(&str, Rule); 4] = [
    ("DeltaNet", Rule::deltanet()),
    ("Gated DeltaNet", Rule::gated_deltanet()),
    ("KDA", Rule::kda()),
    ("DeltaProduct, 2 a token", Rule::delta_product(2)),
];

/// Recall at every load: plain linear attention, then [`RULES`].
type Table = Vec<[f64; LOADS.len()]>;

pub(crate) fn show(settings: &Settings) -> Result<Vec<Claim>> {
    let mut rng = Rng::new(settings.seed);
    let mut engine = Engine::new(settings.device);
    let heads = (2048 / settings.key_dim).clamp(8, 32);
    print(&format!(
        "Device: {} ({}).\n\n\
         Pairs of a random unit key ({} numbers) and a random value ({VALUE_DIM} signs) are written into a\n\
         state of {} x {VALUE_DIM} numbers, then every key is read once. A value counts as recalled when all\n\
         of its {VALUE_DIM} signs come back. The average is over {heads} memories, one in each head.\n\
         Linear attention adds every pair to the state; a delta rule writes only what the state got wrong.\n",
        settings.device.name(),
        settings.why,
        settings.key_dim,
        settings.key_dim,
    ))?;
    let mut table = |title, showings, generations| {
        let schedule = Schedule { showings, generations };
        recall_table(&mut engine, &mut rng, settings.key_dim, heads, title, schedule)
    };
    table("Each pair shown once: whatever the rule, every new pair disturbs the older ones", 1, 1)?;
    let repeated = table("Each pair shown four times: the delta rules correct what interfered", 4, 1)?;
    let rewritten = table("Each key then given a new value, four times: only the new one counts", 4, 2)?;
    let mut claims = recall_claims(&repeated, &rewritten);
    claims.push(same_state(&mut engine, &mut rng, settings.key_dim, heads)?);
    claims.push(swap_table(&mut engine, &mut rng, heads)?);
    speed_table(&mut engine, &mut rng, settings.key_dim, heads)?;
    let error = engine.worst_error;
    claims.push(Claim {
        text: format!(
            "every call is within 1e-4 of the f64 token loop, rms(err)/rms(ref) (worst {error:.1e})"
        ),
        held: error < 1e-4,
    });
    Ok(claims)
}

fn recall_table(
    engine: &mut Engine,
    rng: &mut Rng,
    key_dim: usize,
    heads: usize,
    title: &str,
    schedule: Schedule,
) -> Result<Table> {
    let mut table = vec![[0.0; LOADS.len()]; 1 + RULES.len()];
    for (column, &load) in LOADS.iter().enumerate() {
        let task = Task::new(rng, heads, key_dim, load, schedule);
        table[0][column] = task.recalled_by_linear_attention();
        for (line, (_, rule)) in RULES.into_iter().enumerate() {
            let (problem, tensors) = task.call(rule)?;
            table[1 + line][column] = task.recalled(rule, &engine.run(&problem, &tensors)?);
        }
    }
    let names = [LINEAR].into_iter().chain(RULES.map(|(name, _)| name));
    let rows: String = names.zip(&table).map(|(name, cells)| row(name, cells)).collect();
    print(&(heading(title, &LOADS) + &rows))?;
    Ok(table)
}

fn recall_claims(repeated: &Table, rewritten: &Table) -> Vec<Claim> {
    let worst = |table: &Table, load: usize| table[1..].iter().map(|row| row[load]).fold(1.0, f64::min);
    let best = |table: &Table, load: usize| table[1..].iter().map(|row| row[load]).fold(0.0, f64::max);
    let claim = |what: &str, rules: f64, linear: f64, held: bool| Claim {
        text: format!("{what} (delta rules {:.0}%, linear {:.0}%)", rules * 100.0, linear * 100.0),
        held,
    };
    let half = (worst(repeated, HALF), repeated[0][HALF]);
    let new = (worst(rewritten, HALF), rewritten[0][HALF]);
    let full = (best(repeated, DOUBLE), repeated[0][DOUBLE]);
    vec![
        claim(
            "half full and shown four times, every delta rule recalls over 80%, linear attention under 50%",
            half.0,
            half.1,
            half.0 > 0.8 && half.1 < 0.5,
        ),
        claim(
            "a rewritten key gives back its new value, over 80%; linear attention mixes both, under 10%",
            new.0,
            new.1,
            new.0 > 0.8 && new.1 < 0.1,
        ),
        claim(
            "there is a limit: with two pairs per dimension no rule recalls half",
            full.0,
            full.1,
            full.0.max(full.1) < 0.5,
        ),
    ]
}

fn same_state(engine: &mut Engine, rng: &mut Rng, key_dim: usize, heads: usize) -> Result<Claim> {
    let task = Task::new(rng, heads, key_dim, 1.0, Schedule { showings: 2, generations: 1 });
    let mut states = Vec::new();
    for rule in [Rule::deltanet(), Rule::delta_product(2)] {
        let (problem, tensors) = task.call(rule)?;
        states.push(engine.run(&problem, &tensors)?.final_state);
    }
    let difference = relative_error(&states[1], &states[0]);
    let text = format!(
        "DeltaProduct with two pairs a token leaves DeltaNet's state in half the tokens (differ by {difference:.1e})"
    );
    Ok(Claim { text, held: difference < 1e-4 })
}

fn swap_table(engine: &mut Engine, rng: &mut Rng, heads: usize) -> Result<Claim> {
    let swaps = Swaps::new(rng, heads);
    let mut tracked = [0.0; 2];
    for (tracked, beta) in tracked.iter_mut().zip([1.0, 2.0]) {
        let (problem, tensors) = swaps.call(beta)?;
        *tracked = swaps.tracked(&engine.run(&problem, &tensors)?);
    }
    print(&format!(
        "\nBalls under {} cups, {} tokens of two swaps each: a swap needs the eigenvalue -1, so beta 2\n{}{}",
        swaps::CUPS,
        swaps::TOKENS,
        row("DeltaProduct, beta 1", &tracked[..1]),
        row("DeltaProduct, beta 2", &tracked[1..]),
    ))?;
    Ok(Claim {
        text: format!(
            "with beta 2 every ball is found, with beta 1 under half ({:.0}%, {:.0}%)",
            tracked[1] * 100.0,
            tracked[0] * 100.0
        ),
        held: tracked[1] == 1.0 && tracked[0] < 0.5,
    })
}

fn speed_table(engine: &mut Engine, rng: &mut Rng, key_dim: usize, heads: usize) -> Result<()> {
    let task = Task::new(rng, heads, key_dim, LOADS[DOUBLE], Schedule { showings: 4, generations: 2 });
    let mut text =
        format!("\nSpeed of the forward pass from host memory to host memory, {heads} heads in f32\n");
    text += &format!("  {:<24} {:>10} {:>12} {:>18}\n", "", "tokens", "tokens/s", "ns per token-head");
    for (name, rule) in RULES {
        let (problem, tensors) = task.call(rule)?;
        let speed = engine.speed(&problem, &tensors)?;
        let (tokens, rate, ns) = (problem.shape().tokens, speed.tokens_per_second, speed.ns_per_token_head);
        text += &format!("  {name:<24} {tokens:>10} {rate:>12.0} {ns:>18.1}\n");
    }
    print(&text)?;
    Ok(())
}
