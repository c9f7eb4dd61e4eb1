//! The shapes of a call, described once and asked by every engine.

use crate::{Decay, Error, Result, Rule};

/// The largest K and V that any engine accepts.
pub const MAX_HEAD_DIM: usize = 256;

/// The sizes of a problem.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// B, rows of equal length; 1 for packed sequences.
    pub batch: usize,
    /// T, tokens per row. May be 0.
    pub tokens: usize,
    /// H, heads of q and k.
    pub heads: usize,
    /// HV, heads of v, beta, g and the state: a multiple of H. Value head `h` reads key head `h / (HV / H)`.
    pub value_heads: usize,
    /// K, channels of q and k.
    pub key_dim: usize,
    /// V, channels of v and o.
    pub value_dim: usize,
}

/// Names the tensors of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Ident {
    Q,
    K,
    V,
    Beta,
    G,
    ALog,
    DtBias,
    InitialState,
    O,
    FinalState,
}

impl Ident {
    /// The name that users know.
    pub const fn name(self) -> &'static str {
        match self {
            Ident::Q => "q",
            Ident::K => "k",
            Ident::V => "v",
            Ident::Beta => "beta",
            Ident::G => "g",
            Ident::ALog => "a_log",
            Ident::DtBias => "dt_bias",
            Ident::InitialState => "initial_state",
            Ident::O => "o",
            Ident::FinalState => "final_state",
        }
    }
}

/// One sequence: a run of tokens in one row of the batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sequence {
    /// Row of the batch.
    pub row: usize,
    /// First token in that row.
    pub start: usize,
    /// Number of tokens; may be 0, the state then passes through unchanged.
    pub len: usize,
}

/// A rule and the shapes it is applied to, checked when made.
///
/// ```
/// use delta_rule::{Problem, Rule, Shape};
/// let shape = Shape { batch: 1, tokens: 10, heads: 2, value_heads: 4, key_dim: 32, value_dim: 64 };
/// let problem = Problem::new(Rule::kda(), shape)?.with_cu_seqlens(&[0, 3, 3, 10])?;
/// assert_eq!(problem.sequences(), 3);
/// # Ok::<(), delta_rule::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    rule: Rule,
    shape: Shape,
    cu_seqlens: Option<Vec<usize>>,
}

impl Problem {
    /// A problem with `shape.batch` sequences of `shape.tokens` tokens.
    ///
    /// # Errors
    /// [`Error::Size`] for a size of 0 or a head dimension over [`MAX_HEAD_DIM`],
    /// [`Error::ValueHeads`] when HV is not a positive multiple of H.
    pub fn new(rule: Rule, shape: Shape) -> Result<Self> {
        let many = usize::MAX;
        let sizes = [
            ("micro_steps (n_h)", rule.micro_steps, many),
            ("batch (B)", shape.batch, many),
            ("heads (H)", shape.heads, many),
            ("key_dim (K)", shape.key_dim, MAX_HEAD_DIM),
            ("value_dim (V)", shape.value_dim, MAX_HEAD_DIM),
        ];
        for (name, got, max) in sizes {
            if got == 0 || got > max {
                return Err(Error::Size { name, max, got });
            }
        }
        let Shape { heads, value_heads, .. } = shape;
        if value_heads == 0 || value_heads % heads != 0 {
            return Err(Error::ValueHeads { heads, value_heads });
        }
        let cells = [shape.batch, shape.tokens, rule.micro_steps, value_heads, MAX_HEAD_DIM, MAX_HEAD_DIM, 8];
        if cells.iter().try_fold(1usize, |n, &d| n.checked_mul(d.max(1))).is_none() {
            return Err(Error::Size { name: "the number of elements", max: many, got: many });
        }
        Ok(Self { rule, shape, cu_seqlens: None })
    }

    /// Packs several sequences into the one row: sequence `n` holds tokens
    /// `cu_seqlens[n]..cu_seqlens[n + 1]`. Offsets count tokens, not micro-steps. Empty sequences are allowed.
    ///
    /// # Errors
    /// [`Error::CuSeqlens`] unless B is 1 and the offsets start at 0, never decrease and end at T.
    pub fn with_cu_seqlens(mut self, cu_seqlens: &[usize]) -> Result<Self> {
        let tokens = self.shape.tokens;
        let refuse = |problem: String| Err(Error::CuSeqlens { tokens, problem });
        if self.shape.batch != 1 {
            return refuse(format!("the batch is {}", self.shape.batch));
        }
        if cu_seqlens.len() < 2 {
            return refuse(format!("it has {} entries, at least 2 are needed", cu_seqlens.len()));
        }
        if cu_seqlens[0] != 0 {
            return refuse(format!("it starts at {}", cu_seqlens[0]));
        }
        if let Some(n) = (1..cu_seqlens.len()).find(|&n| cu_seqlens[n] < cu_seqlens[n - 1]) {
            return refuse(format!("entry {n} is {} after {}", cu_seqlens[n], cu_seqlens[n - 1]));
        }
        if cu_seqlens[cu_seqlens.len() - 1] != tokens {
            return refuse(format!("it ends at {}", cu_seqlens[cu_seqlens.len() - 1]));
        }
        self.cu_seqlens = Some(cu_seqlens.to_vec());
        Ok(self)
    }

    /// The rule.
    pub fn rule(&self) -> Rule {
        self.rule
    }

    /// The sizes.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// The packing, if there is one.
    pub fn cu_seqlens(&self) -> Option<&[usize]> {
        self.cu_seqlens.as_deref()
    }

    /// N, the number of sequences: B, or the number of packed ones.
    pub fn sequences(&self) -> usize {
        self.cu_seqlens.as_ref().map_or(self.shape.batch, |cu| cu.len() - 1)
    }

    /// Where sequence `n` lies.
    pub fn sequence(&self, n: usize) -> Sequence {
        match &self.cu_seqlens {
            Some(cu) => Sequence { row: 0, start: cu[n], len: cu[n + 1] - cu[n] },
            None => Sequence { row: n, start: 0, len: self.shape.tokens },
        }
    }

    /// T * n_h, the rows of k, v and beta.
    pub fn steps(&self) -> usize {
        self.shape.tokens * self.rule.micro_steps
    }

    /// The key head that value head `hv` reads.
    pub fn key_head(&self, hv: usize) -> usize {
        hv / (self.shape.value_heads / self.shape.heads)
    }

    /// Channels of the gate: K for a gate per channel, else 1.
    pub fn gate_dim(&self) -> usize {
        if self.rule.decay == Decay::Channel { self.shape.key_dim } else { 1 }
    }

    /// The shape of a tensor, states as `[N, HV, K, V]`.
    pub fn shape_of(&self, tensor: Ident) -> Vec<usize> {
        let Shape { batch, tokens, heads, value_heads, key_dim, value_dim } = self.shape;
        let per_channel = self.rule.decay == Decay::Channel;
        match tensor {
            Ident::Q => vec![batch, tokens, heads, key_dim],
            Ident::K => vec![batch, self.steps(), heads, key_dim],
            Ident::V => vec![batch, self.steps(), value_heads, value_dim],
            Ident::Beta => vec![batch, self.steps(), value_heads],
            Ident::G if per_channel => vec![batch, tokens, value_heads, key_dim],
            Ident::G => vec![batch, tokens, value_heads],
            Ident::ALog => vec![value_heads],
            Ident::DtBias if per_channel => vec![value_heads, key_dim],
            Ident::DtBias => vec![value_heads],
            Ident::O => vec![batch, tokens, value_heads, value_dim],
            Ident::InitialState | Ident::FinalState => {
                vec![self.sequences(), value_heads, key_dim, value_dim]
            }
        }
    }

    /// The number of elements of a tensor.
    pub fn len_of(&self, tensor: Ident) -> usize {
        self.shape_of(tensor).iter().product()
    }
}
