//! The gradients of one sequence and head, last chunk first; sequences and heads side by side.

use rayon::prelude::*;

use super::forward::Writes;
use super::lane::{Chunk, Lane, Span, store_state};
use super::matrix::{View, product};
use super::pairs::{Pairs, Roles};
use crate::transform::Effective;
use crate::{Decay, Gradients, Ident, Inputs, Options, OutputGradients, Problem, Real, Result};

/// Computes the gradients of all inputs from those of `o` and of the final state, chunk by chunk, on all threads of
/// the current rayon pool.
///
/// The state before every chunk is computed first and kept: `K V ceil(T n_h / chunk_size)` numbers for each sequence
/// and head that a thread works on. The result has the same bits whatever the number of threads.
///
/// # Errors
/// As [`forward`](super::forward), and for gradients of the wrong length.
pub fn backward<T: Real>(
    problem: &Problem,
    options: &Options,
    inputs: &Inputs<'_, T>,
    output_gradients: &OutputGradients<'_, T>,
) -> Result<Gradients<T>> {
    inputs.validate(problem, options)?;
    output_gradients.validate(problem)?;
    let tensors = Effective::new(problem, options, inputs);
    let heads = problem.shape().value_heads;
    let lanes: Vec<_> = (0..problem.sequences() * heads)
        .into_par_iter()
        .map(|i| {
            let (n, hv) = (i / heads, i % heads);
            run(&Lane { problem, options, tensors: &tensors, v: inputs.v, n, hv }, inputs, output_gradients)
        })
        .collect();
    let gradients = gather(problem, options, &lanes);
    Ok(Effective::backward(problem, options, inputs, gradients))
}

/// The gradients of a lane's rows.
struct LaneGradients<T> {
    /// `[len, K]`
    q: Vec<T>,
    /// `[steps, K]`
    k: Vec<T>,
    /// `[steps, V]`
    v: Vec<T>,
    /// `[steps]`
    beta: Vec<T>,
    /// `[len]` or `[len, K]`; empty if nothing decays.
    g: Vec<T>,
    /// `[K, V]`
    state: Vec<T>,
}

/// Puts the rows of all lanes into their tensors; value heads that share a key head are added in their order.
fn gather<T: Real>(problem: &Problem, options: &Options, lanes: &[LaneGradients<T>]) -> Gradients<T> {
    let shape = problem.shape();
    let (heads, n_h, gates) = (shape.value_heads, problem.rule().micro_steps, problem.gate_dim());
    let zeros = |ident| vec![T::zero(); problem.len_of(ident)];
    let mut to = Gradients {
        q: zeros(Ident::Q),
        k: zeros(Ident::K),
        v: zeros(Ident::V),
        beta: zeros(Ident::Beta),
        g: (problem.rule().decay != Decay::None).then(|| zeros(Ident::G)),
        a_log: None,
        dt_bias: None,
        initial_state: zeros(Ident::InitialState),
    };
    for (n, lanes) in lanes.chunks_exact(heads).enumerate() {
        let sequence = problem.sequence(n);
        let token = sequence.row * shape.tokens + sequence.start;
        for (hv, lane) in lanes.iter().enumerate() {
            let h = problem.key_head(hv);
            add_rows(&mut to.q, &lane.q, shape.key_dim, token, shape.heads, h);
            add_rows(&mut to.k, &lane.k, shape.key_dim, token * n_h, shape.heads, h);
            add_rows(&mut to.v, &lane.v, shape.value_dim, token * n_h, heads, hv);
            add_rows(&mut to.beta, &lane.beta, 1, token * n_h, heads, hv);
            if let Some(g) = &mut to.g {
                add_rows(g, &lane.g, gates, token, heads, hv);
            }
            let state = &mut to.initial_state[(n * heads + hv) * lane.state.len()..][..lane.state.len()];
            store_state(problem, options, &lane.state, state);
        }
    }
    to
}

/// Adds rows of one head, from row `first` on, to a tensor `[.., heads, width]`.
fn add_rows<T: Real>(to: &mut [T], rows: &[T], width: usize, first: usize, heads: usize, head: usize) {
    let to = to[first * heads * width..].chunks_exact_mut(heads * width);
    for (to, row) in to.zip(rows.chunks_exact(width)) {
        to[head * width..][..width].iter_mut().zip(row).for_each(|(to, &x)| *to += x);
    }
}

fn run<T: Real>(
    lane: &Lane<'_, T>,
    inputs: &Inputs<'_, T>,
    output_gradients: &OutputGradients<'_, T>,
) -> LaneGradients<T> {
    let shape = lane.problem.shape();
    let (dim, width) = (shape.key_dim, shape.value_dim);
    let n_h = lane.problem.rule().micro_steps;
    let (steps, tokens) = (lane.steps(), lane.steps() / n_h);
    let mut chunk = lane.buffers();
    let mut writes = Writes::new(lane);

    let mut state = lane.state(inputs.initial_state);
    let mut states = Vec::with_capacity(lane.spans().len());
    for span in lane.spans() {
        lane.prepare(&mut chunk, span);
        writes.solve(lane, &chunk, span, &state);
        let before = state.clone();
        writes.advance(&chunk, span, &mut state);
        states.push(before);
    }

    let zeros = |len: usize| vec![T::zero(); len];
    let gates = if lane.problem.rule().decay == Decay::None { 0 } else { lane.problem.gate_dim() };
    let mut to = LaneGradients {
        q: zeros(tokens * dim),
        k: zeros(steps * dim),
        v: zeros(steps * width),
        beta: zeros(steps),
        g: zeros(tokens * gates),
        state: lane.state(output_gradients.final_state),
    };
    let mut buffers = Buffers::new(lane);
    for (span, state) in lane.spans().zip(&states).rev() {
        lane.prepare(&mut chunk, span);
        writes.solve(lane, &chunk, span, state);
        buffers.chunk(lane, &chunk, &writes, span, state, output_gradients.o, &mut to);
    }
    to
}

/// The buffers of a lane, made once.
struct Buffers<T> {
    d_o: Vec<T>,
    dn: Vec<T>,
    k: Vec<T>,
    q: Vec<T>,
    beta_k: Vec<T>,
    y: Vec<T>,
    x: Vec<T>,
    near_y: Vec<T>,
    near_x: Vec<T>,
    reads: Vec<T>,
    erases: Vec<T>,
    writes: Vec<T>,
    ends: Vec<T>,
}

impl<T: Real> Buffers<T> {
    fn new(lane: &Lane<'_, T>) -> Self {
        let shape = lane.problem.shape();
        let (chunk, n_h) = (lane.chunk_size(), lane.problem.rule().micro_steps);
        let new = |width: usize| vec![T::zero(); chunk * width];
        Self {
            d_o: new(shape.value_dim),
            dn: new(shape.value_dim),
            k: new(shape.key_dim),
            q: new(shape.key_dim),
            beta_k: new(shape.key_dim),
            y: new(chunk),
            x: new(chunk),
            near_y: new(n_h),
            near_x: new(n_h),
            reads: new(shape.key_dim),
            erases: new(shape.key_dim),
            writes: new(shape.key_dim),
            ends: new(shape.key_dim),
        }
    }

    /// The gradients of a chunk's rows; `to.state` goes from after the chunk to before it.
    #[allow(clippy::too_many_arguments)]
    fn chunk(
        &mut self,
        lane: &Lane<'_, T>,
        chunk: &Chunk<T>,
        written: &Writes<T>,
        span: Span,
        state: &[T],
        d_o: &[T],
        to: &mut LaneGradients<T>,
    ) {
        let shape = lane.problem.shape();
        let (dim, width) = (shape.key_dim, shape.value_dim);
        let n_h = lane.problem.rule().micro_steps;
        let Span { step0, rows, token, reads, first } = span;
        let (zero, one) = (T::zero(), T::one());

        for r in 0..reads {
            let from = lane.row(token + r, 1, shape.value_heads, lane.hv) * width;
            self.d_o[r * width..][..width].copy_from_slice(&d_o[from..][..width]);
        }
        let d_o = View::new(&self.d_o, reads, width, width);
        let state = View::new(state, dim, width, width);
        let r = View::new(&written.r, rows, width, width);

        // dN = P^T dO + Kd dS, dV = M^T diag(beta) dN
        let dn = &mut self.dn[..rows * width];
        let kd = View::new(&chunk.kd, rows, dim, dim);
        product(dn, width, zero, one, kd, View::new(&to.state, dim, width, width));
        if reads > 0 {
            let p = View::new(&chunk.p[first * rows..], reads, rows, n_h * rows);
            product(dn, width, one, one, p.t(), d_o);
        }
        for (row, &beta) in dn.chunks_exact_mut(width).zip(&chunk.beta) {
            row.iter_mut().for_each(|x| *x *= beta);
        }
        let dv = &mut to.v[step0 * width..][..rows * width];
        let m = View::new(&chunk.m, rows, rows, rows);
        product(dv, width, zero, one, m.t(), View::new(dn, rows, width, width));
        let dv = View::new(dv, rows, width, width);

        // Through the states, and between the rows of the chunk.
        let d_state = View::new(&to.state, dim, width, width);
        product(&mut self.reads, dim, zero, one, d_o, state.t());
        product(&mut self.erases, dim, zero, -one, dv, state.t());
        product(&mut self.ends, dim, zero, one, r, d_state.t());
        product(&mut self.y, rows, zero, one, d_o, r.t());
        product(&mut self.x, rows, zero, -one, dv, r.t());
        self.split(span, n_h);
        self.load(lane, chunk, span);
        let mut pairs = Pairs {
            k: &self.k,
            q: &self.q,
            beta_k: &self.beta_k,
            y: &mut self.y,
            x: &mut self.x,
            decays: &chunk.decays,
            span,
            n_h,
            dim,
        };
        let mut roles = Roles {
            reads: &mut self.reads,
            erases: &mut self.erases,
            writes: &mut self.writes,
            ends: &mut self.ends,
        };
        pairs.backward(&mut roles, lane.problem.rule().decay);
        if !to.g.is_empty() {
            let carried: Vec<T> = chunk
                .gamma
                .iter()
                .enumerate()
                .map(|(i, &gamma)| gamma * dot(state.row(i), d_state.row(i)))
                .collect();
            self.gates(chunk, span, n_h, &carried, &mut to.g);
        }
        self.finish(lane, chunk, span, to);

        // dS <- gamma dS + Qg^T dO - Kg^T dV
        for (row, &gamma) in to.state.chunks_exact_mut(width).zip(&chunk.gamma) {
            row.iter_mut().for_each(|s| *s *= gamma);
        }
        let dv = View::new(&to.v[step0 * width..], rows, width, width);
        product(&mut to.state, width, one, -one, View::new(&chunk.k, rows, dim, dim).t(), dv);
        if reads > 0 {
            let qg = View::new(&chunk.q[first * dim..], reads, dim, n_h * dim);
            product(&mut to.state, width, one, one, qg.t(), View::new(&self.d_o, reads, width, width));
        }
    }

    /// Takes pairs inside a token out of `y` and `x`, times beta of the row that writes: no decay lies between
    /// their rows, and in the gradient of the gates they would cancel only after burying it.
    fn split(&mut self, span: Span, n_h: usize) {
        let Span { step0, rows, reads, first, .. } = span;
        let of_token = |row: usize| row - row.min((step0 + row) % n_h);
        self.near_y.fill(T::zero());
        self.near_x.fill(T::zero());
        for r in 0..reads {
            let row = first + r * n_h;
            let y = &mut self.y[r * rows..][..rows];
            for j in of_token(row)..=row {
                self.near_y[j * n_h + row - j] = y[j];
            }
            y[of_token(row)..].fill(T::zero());
        }
        for i in 0..rows {
            let x = &mut self.x[i * rows..][..rows];
            for j in of_token(i)..i {
                self.near_x[j * n_h + i - j] = x[j];
            }
            x[of_token(i)..].fill(T::zero());
        }
    }

    /// The raw rows of q and k.
    fn load(&mut self, lane: &Lane<'_, T>, chunk: &Chunk<T>, span: Span) {
        let dim = lane.problem.shape().key_dim;
        let scale = T::of(lane.options.scale_for(dim));
        for i in 0..span.rows {
            let key = lane.k(span.step0 + i);
            self.k[i * dim..][..dim].copy_from_slice(key);
            let beta_k = &mut self.beta_k[i * dim..][..dim];
            beta_k.iter_mut().zip(key).for_each(|(x, &k)| *x = chunk.beta[i] * k);
        }
        for r in 0..span.reads {
            let q = &mut self.q[r * dim..][..dim];
            q.iter_mut().zip(lane.q(span.token + r)).for_each(|(x, &q)| *x = scale * q);
        }
    }

    /// The decay of a row lies in every path from before it to it or beyond: in what later rows get from earlier ones
    /// and from the state, in what the earlier leave to the next chunk, and in what is carried through (`carried`).
    fn gates(&self, chunk: &Chunk<T>, span: Span, n_h: usize, carried: &[T], to: &mut [T]) {
        let Span { step0, rows, reads, first, .. } = span;
        let dim = carried.len();
        let gates = chunk.decays.len() / (chunk.beta.len());
        let of = |x: &[T], i: usize| x[i * dim..][..dim].to_vec();
        let mut earlier = fold(carried, gates);
        for i in 0..rows {
            if (step0 + i).is_multiple_of(n_h) {
                add(&mut to[(step0 + i) / n_h * gates..][..gates], &earlier);
            }
            let left = times(&of(&self.beta_k, i), &self.ends[i * dim..][..dim]);
            add(&mut earlier, &fold(&left, gates));
        }
        let mut later = vec![T::zero(); gates];
        for i in (0..rows).rev() {
            let mut got = times(&of(&self.k, i), &self.erases[i * dim..][..dim]);
            let given = times(&of(&self.beta_k, i), &self.writes[i * dim..][..dim]);
            got.iter_mut().zip(&given).for_each(|(x, &y)| *x -= y);
            if i >= first && (i - first).is_multiple_of(n_h) && (i - first) / n_h < reads {
                let r = (i - first) / n_h;
                add(&mut got, &times(&of(&self.q, r), &self.reads[r * dim..][..dim]));
            }
            add(&mut later, &fold(&got, gates));
            if (step0 + i).is_multiple_of(n_h) {
                add(&mut to[(step0 + i) / n_h * gates..][..gates], &later);
            }
        }
    }

    /// Adds the pairs inside a token, and joins the roles.
    fn finish(&mut self, lane: &Lane<'_, T>, chunk: &Chunk<T>, span: Span, to: &mut LaneGradients<T>) {
        let dim = lane.problem.shape().key_dim;
        let n_h = lane.problem.rule().micro_steps;
        let scale = T::of(lane.options.scale_for(dim));
        let Span { step0, rows, reads, first, token } = span;
        for j in 0..rows {
            for off in 0..n_h.min(rows - j) {
                let i = j + off;
                let x = self.near_x[j * n_h + off];
                let y = self.near_y[j * n_h + off];
                let writes = &mut self.writes[j * dim..][..dim];
                axpy(writes, x, &self.k[i * dim..][..dim]);
                axpy(&mut self.erases[i * dim..][..dim], x, &self.beta_k[j * dim..][..dim]);
                if i >= first && (i - first).is_multiple_of(n_h) && (i - first) / n_h < reads {
                    let r = (i - first) / n_h;
                    axpy(writes, y, &self.q[r * dim..][..dim]);
                    axpy(&mut self.reads[r * dim..][..dim], y, &self.beta_k[j * dim..][..dim]);
                }
            }
        }
        let dq = &mut to.q[token * dim..][..reads * dim];
        dq.iter_mut().zip(&self.reads).for_each(|(d, &x)| *d = scale * x);
        for i in 0..rows {
            let at = i * dim..(i + 1) * dim;
            let dk = &mut to.k[(step0 + i) * dim..][..dim];
            for ((d, &w), &e) in dk.iter_mut().zip(&self.writes[at.clone()]).zip(&self.ends[at.clone()]) {
                *d = w + e;
            }
            to.beta[step0 + i] = dot(&self.k[at.clone()], dk);
            for (d, &e) in dk.iter_mut().zip(&self.erases[at]) {
                *d = *d * chunk.beta[i] + e;
            }
        }
    }
}

/// Channels of the gate from channels of the keys: the same, or their sum.
fn fold<T: Real>(x: &[T], gates: usize) -> Vec<T> {
    if gates == x.len() { x.to_vec() } else { vec![x.iter().copied().sum()] }
}

fn times<T: Real>(x: &[T], y: &[T]) -> Vec<T> {
    x.iter().zip(y).map(|(&x, &y)| x * y).collect()
}

fn add<T: Real>(to: &mut [T], x: &[T]) {
    to.iter_mut().zip(x).for_each(|(to, &x)| *to += x);
}

fn axpy<T: Real>(y: &mut [T], a: T, x: &[T]) {
    y.iter_mut().zip(x).for_each(|(y, &x)| *y += a * x);
}

fn dot<T: Real>(x: &[T], y: &[T]) -> T {
    x.iter().zip(y).map(|(&x, &y)| x * y).sum()
}
