//! The two tasks, drawn afresh for every step.

use crate::rng::Rng;

/// What a model sees of a token, and what it should answer there.
pub(crate) struct Token {
    pub(crate) kind: usize,
    pub(crate) key: usize,
    pub(crate) value: usize,
    /// What `o` should be; `None`: nobody asks.
    pub(crate) target: Option<Vec<f32>>,
}

/// Episodes of equal length, one after the other.
pub(crate) struct Batch {
    pub(crate) episodes: usize,
    pub(crate) length: usize,
    pub(crate) tokens: Vec<Token>,
}

/// A source of episodes, and how many symbols of each sort they use.
pub(crate) struct Task {
    pub(crate) kinds: &'static [&'static str],
    pub(crate) keys: usize,
    pub(crate) values: usize,
    pub(crate) value_dim: usize,
    episode: fn(&mut Rng, usize) -> Vec<Token>,
}

impl Task {
    pub(crate) fn batch(&self, rng: &mut Rng, episodes: usize, length: usize) -> Batch {
        let tokens = (0..episodes).flat_map(|_| (self.episode)(rng, length)).collect();
        Batch { episodes, length, tokens }
    }
}

/// Say what was last written under a key since the last reset: its code, or zeros if nothing was.
///
/// Every token carries a key and a value, also those whose kind makes them mean nothing. A reset has a key of its
/// own.
pub(crate) const RECALL: Task = Task {
    kinds: &["write", "noise", "reset", "query"],
    keys: KEYS + 1,
    values: VALUES,
    value_dim: VALUES,
    episode: recall,
};
pub(crate) const WRITE: usize = 0;
pub(crate) const NOISE: usize = 1;
pub(crate) const RESET: usize = 2;
pub(crate) const QUERY: usize = 3;

/// Keys that are written and read.
pub(crate) const KEYS: usize = 12;
pub(crate) const VALUES: usize = 16;

fn recall(rng: &mut Rng, length: usize) -> Vec<Token> {
    let mut memory = [None; KEYS];
    let mut token = || {
        let (key, value) = (rng.below(KEYS), rng.below(VALUES));
        let kind = match rng.below(20) {
            0..7 => WRITE,
            7..11 => NOISE,
            11..12 => RESET,
            _ => QUERY,
        };
        match kind {
            WRITE => memory[key] = Some(value),
            RESET => memory = [None; KEYS],
            _ => {}
        }
        let target = (kind == QUERY).then(|| memory[key].map_or(vec![0.0; VALUES], code));
        Token { kind, key: if kind == RESET { KEYS } else { key }, value, target }
    };
    (0..length).map(|_| token()).collect()
}

/// A row of the Walsh matrix: signs, orthogonal to those of every other value.
pub(crate) fn code(value: usize) -> Vec<f32> {
    (0..VALUES).map(|i| if (i & value).count_ones().is_multiple_of(2) { 1.0 } else { -1.0 }).collect()
}

/// Say at every bit whether the ones so far are even (1) or odd (-1).
///
/// Both bits have the same key and value. The start, of which the answer is always 1, has a value of its own:
/// without it half of all seeds never leave the plateau on which every answer is about 0.
pub(crate) const PARITY: Task =
    Task { kinds: &["zero", "one", "start"], keys: 1, values: 2, value_dim: 1, episode: parity };
pub(crate) const ZERO: usize = 0;
pub(crate) const ONE: usize = 1;
const START: usize = 2;

fn parity(rng: &mut Rng, length: usize) -> Vec<Token> {
    let mut sign = 1.0;
    let mut token = |t| {
        let kind = if t == 0 { START } else { [ZERO, ONE][rng.below(2)] };
        if kind == ONE {
            sign = -sign;
        }
        Token { kind, key: 0, value: usize::from(kind == START), target: Some(vec![sign]) }
    };
    (0..length).map(&mut token).collect()
}
