//! `--name value` and `--name=value`, refused early and by name.

use std::ffi::OsString;

/// Whatever stops a run before it has a result; shown on one line.
pub(crate) type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// The flags that were given, each at most once.
pub(crate) struct Flags(Vec<(String, String)>);

impl Flags {
    /// The value of `--name`, read by `read`.
    pub(crate) fn get<T>(&self, name: &str, read: impl Fn(&str) -> Result<T>) -> Result<Option<T>> {
        let Some((_, value)) = self.0.iter().find(|(given, _)| given == name) else { return Ok(None) };
        read(value).map(Some).map_err(|error| format!("--{name} {value}: {error}").into())
    }
}

/// Says where to read about a wrong command line.
pub(crate) fn with_hint(error: Box<dyn std::error::Error>) -> Box<dyn std::error::Error> {
    format!("{error} (--help shows the usage)").into()
}

/// Splits the arguments into positional ones and flags, of which only `known` exist. `None`: help was asked for.
pub(crate) fn split(
    args: impl IntoIterator<Item = OsString>,
    known: &[&str],
) -> Result<Option<(Vec<String>, Flags)>> {
    let (mut positional, mut flags) = (Vec::new(), Vec::<(String, String)>::new());
    let mut args = args
        .into_iter()
        .map(|arg| arg.into_string().map_err(|arg| format!("the argument {arg:?} is not valid UTF-8")));
    while let Some(arg) = args.next() {
        let arg = arg?;
        if arg == "--help" || arg == "-h" {
            return Ok(None);
        }
        if !arg.starts_with('-') {
            positional.push(arg);
            continue;
        }
        let (name, value) = match arg.split_once('=') {
            Some((name, value)) => (name.to_string(), Some(value.to_string())),
            None => (arg, None),
        };
        let Some(name) = name.strip_prefix("--").filter(|name| known.contains(name)) else {
            return Err(format!("unknown flag {name}; there are --{}", known.join(", --")).into());
        };
        if flags.iter().any(|(given, _)| given == name) {
            return Err(format!("--{name} is given twice").into());
        }
        let value = match value {
            Some(value) => value,
            None => args.next().ok_or_else(|| format!("--{name} needs a value"))??,
        };
        flags.push((name.to_string(), value));
    }
    Ok(Some((positional, Flags(flags))))
}

/// Reads a number within bounds.
pub(crate) fn number(text: &str, min: u64, max: u64) -> Result<u64> {
    match text.parse() {
        Ok(n) if (min..=max).contains(&n) => Ok(n),
        _ => Err(format!("expected a whole number from {min} to {max}").into()),
    }
}
