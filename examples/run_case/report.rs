//! The comparison as a table.

use std::fmt::Write;

use crate::case::Case;
use crate::compare::relative_error;
use crate::compute::Computed;
use crate::settings::Settings;

/// The text to print, and whether every result is within the tolerance.
pub(crate) fn report(settings: &Settings, case: &Case, results: &[Computed]) -> (String, bool) {
    let shape = case.problem.shape();
    let mut text = format!(
        "{}: {}, B={} T={} H={} HV={} K={} V={} N={} n_h={}\n{} {} in {}\n\n",
        settings.file.display(),
        case.rule,
        shape.batch,
        shape.tokens,
        shape.heads,
        shape.value_heads,
        shape.key_dim,
        shape.value_dim,
        case.problem.sequences(),
        case.problem.rule().micro_steps,
        settings.device.name(),
        settings.engine.name(),
        settings.dtype.name(),
    );
    let row = ["tensor", "rms(err)/rms(truth)", "tolerance", "result", "FLA's error"];
    line(&mut text, row);
    let mut held = true;
    for expected in &case.expected {
        let Some(got) = results.iter().find(|result| result.name == expected.name) else { continue };
        let error = relative_error(&got.values, &expected.truth);
        let ok = error <= settings.tolerance;
        held &= ok;
        let fla = expected.fla.map_or("-".to_string(), |error| format!("{error:.3e}"));
        let (error, tolerance) = (format!("{error:.3e}"), format!("{:.1e}", settings.tolerance));
        line(&mut text, [expected.name, &error, &tolerance, if ok { "ok" } else { "FAIL" }, &fla]);
    }
    (text, held)
}

fn line(text: &mut String, [name, error, tolerance, result, fla]: [&str; 5]) {
    writeln!(text, "{name:<12} {error:>19} {tolerance:>10} {result:>7} {fla:>12}")
        .expect("writes to a String");
}
