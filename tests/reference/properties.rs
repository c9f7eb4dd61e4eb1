//! Algebra of the rules on generated problems.

use std::ops::Range;

use delta_rule::reference::{backward, forward};
use delta_rule::{Decay, Gradients, Ident, Options, Output, Problem, Rule, Shape};
use proptest::prelude::*;

use crate::common::{Axis, Generator, RULES, Tensors, assert_close, problem, select};

fn run(problem: &Problem, tensors: &Tensors<f64>) -> Output<f64> {
    forward(problem, &Options::new(), &tensors.inputs()).unwrap()
}

fn gradients(problem: &Problem, tensors: &Tensors<f64>) -> Gradients<f64> {
    backward(problem, &Options::new(), &tensors.inputs(), &tensors.output_gradients()).unwrap()
}

fn with_tokens(problem: &Problem, tokens: usize) -> Problem {
    Problem::new(problem.rule(), Shape { tokens, ..problem.shape() }).unwrap()
}

fn generated(problem: &Problem, seed: u64) -> Tensors<f64> {
    Generator::new(seed).beta_max(2.0).gate_min(-3.0).tensors(problem, &Options::new())
}

/// The results that have a token dimension.
fn by_token<'a>(output: &'a Output<f64>, d: &'a Gradients<f64>) -> Vec<(Ident, &'a [f64])> {
    let mut all = vec![
        (Ident::O, &output.o[..]),
        (Ident::Q, &d.q),
        (Ident::K, &d.k),
        (Ident::V, &d.v),
        (Ident::Beta, &d.beta),
    ];
    all.extend(d.g.as_deref().map(|g| (Ident::G, g)));
    all
}

/// The tokens `range` of `whole` give these results, to the bit.
fn assert_same_tokens(
    problem: &Problem,
    whole: (&Output<f64>, &Gradients<f64>),
    range: Range<usize>,
    part: (&Output<f64>, &Gradients<f64>),
) {
    let picked = range.collect::<Vec<_>>();
    for ((ident, whole), (_, part)) in by_token(whole.0, whole.1).into_iter().zip(by_token(part.0, part.1)) {
        assert_eq!(select(problem, ident, whole, Axis::Tokens, &picked), part, "{ident:?}");
    }
}

prop_compose! {
    fn problems()(
        rule in prop::sample::select(RULES.to_vec()),
        batch in 1..3usize,
        tokens in 1..90usize,
        heads in 1..3usize,
        group in 1..3usize,
        key_dim in 1..7usize,
        value_dim in 1..20usize,
    ) -> Problem {
        problem(rule, [batch, tokens, heads, heads * group, key_dim, value_dim])
    }
}

prop_compose! {
    /// Sorted offsets, so that empty sequences occur.
    fn packed()(p in problems(), mut cuts in prop::collection::vec(0..90usize, 0..4)) -> Problem {
        let shape = Shape { batch: 1, ..p.shape() };
        cuts.iter_mut().for_each(|c| *c = (*c).min(shape.tokens));
        cuts.extend([0, shape.tokens]);
        cuts.sort();
        Problem::new(p.rule(), shape).unwrap().with_cu_seqlens(&cuts).unwrap()
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn split_anywhere_with_the_state_carried_is_one_pass(p in problems(), cut in 0..=90usize, seed: u64) {
        let tokens = p.shape().tokens;
        let cut = cut.min(tokens);
        let whole = generated(&p, seed);
        let (whole_output, whole_gradients) = (run(&p, &whole), gradients(&p, &whole));
        let (p1, p2) = (with_tokens(&p, cut), with_tokens(&p, tokens - cut));
        let part = |range: Range<usize>| whole.select(&p, Axis::Tokens, &range.collect::<Vec<_>>());
        let (mut first, mut second) = (part(0..cut), part(cut..tokens));

        let output1 = run(&p1, &first);
        second.initial_state = Some(output1.final_state.clone());
        let (output2, gradients2) = (run(&p2, &second), gradients(&p2, &second));
        first.d_final_state = Some(gradients2.initial_state.clone());
        let gradients1 = gradients(&p1, &first);

        let whole_results = (&whole_output, &whole_gradients);
        assert_same_tokens(&p, whole_results, 0..cut, (&output1, &gradients1));
        assert_same_tokens(&p, whole_results, cut..tokens, (&output2, &gradients2));
        assert_eq!(whole_output.final_state, output2.final_state);
        assert_eq!(whole_gradients.initial_state, gradients1.initial_state);
    }

    #[test]
    fn packed_sequences_are_separate_runs(p in packed(), seed: u64) {
        let packed = generated(&p, seed);
        let (output, d) = (run(&p, &packed), gradients(&p, &packed));
        let states = p.len_of(Ident::InitialState) / p.sequences();
        for n in 0..p.sequences() {
            let sequence = p.sequence(n);
            let range = sequence.start..sequence.start + sequence.len;
            let alone = Problem::new(p.rule(), Shape { tokens: sequence.len, ..p.shape() }).unwrap();
            let mut tensors = packed.select(&p, Axis::Tokens, &range.clone().collect::<Vec<_>>());
            let state = n * states..(n + 1) * states;
            for s in [&mut tensors.initial_state, &mut tensors.d_final_state].into_iter().flatten() {
                *s = s[state.clone()].to_vec();
            }
            let (output1, d1) = (run(&alone, &tensors), gradients(&alone, &tensors));
            assert_same_tokens(&p, (&output, &d), range, (&output1, &d1));
            assert_eq!(&output.final_state[state.clone()], output1.final_state);
            assert_eq!(&d.initial_state[state], d1.initial_state);
        }
    }

    #[test]
    fn padding_changes_nothing(p in problems(), pad in 1..4usize, seed: u64) {
        let tokens = p.shape().tokens;
        let padded = with_tokens(&p, tokens + pad);
        let mut tensors = generated(&padded, seed);
        let real = (0..tokens).collect::<Vec<_>>();
        let shorter = tensors.select(&padded, Axis::Tokens, &real);
        let Tensors { q, k, beta, g, d_o, .. } = &mut tensors;
        let mut zeroed = vec![(Ident::Q, q), (Ident::K, k), (Ident::Beta, beta), (Ident::O, d_o)];
        zeroed.extend(g.as_mut().map(|g| (Ident::G, g)));
        for (ident, x) in zeroed {
            let per_row = x.len() / p.shape().batch;
            let kept = p.len_of(ident) / p.shape().batch;
            x.chunks_exact_mut(per_row).for_each(|row| row[kept..].fill(0.0));
        }
        let (output, d) = (run(&padded, &tensors), gradients(&padded, &tensors));
        let (output1, d1) = (run(&p, &shorter), gradients(&p, &shorter));
        assert_same_tokens(&padded, (&output, &d), 0..tokens, (&output1, &d1));
        assert_eq!(output.final_state, output1.final_state);
        assert_eq!(d.initial_state, d1.initial_state);
    }

    #[test]
    fn the_past_does_not_see_the_future(p in problems(), at in 0..90usize, seed: u64) {
        let tokens = p.shape().tokens;
        let at = at.min(tokens - 1);
        let past = (0..at).collect::<Vec<_>>();
        let mut tensors = generated(&p, seed);
        let before = run(&p, &tensors);
        let other = generated(&p, seed.wrapping_add(1));
        // Token `at` and all later ones are replaced.
        let merged = |ident, a: &[f64], b: &[f64]| {
            let row = p.len_of(ident) / p.shape().batch;
            let kept = row / tokens * at;
            let rows = a.chunks_exact(row).zip(b.chunks_exact(row));
            rows.flat_map(|(a, b)| a[..kept].iter().chain(&b[kept..]).copied()).collect::<Vec<_>>()
        };
        tensors.q = merged(Ident::Q, &tensors.q, &other.q);
        tensors.k = merged(Ident::K, &tensors.k, &other.k);
        tensors.v = merged(Ident::V, &tensors.v, &other.v);
        tensors.beta = merged(Ident::Beta, &tensors.beta, &other.beta);
        tensors.g = tensors.g.zip(other.g).map(|(a, b)| merged(Ident::G, &a, &b));
        let after = run(&p, &tensors);
        let o = |output: &Output<f64>| select(&p, Ident::O, &output.o, Axis::Tokens, &past);
        assert_eq!(o(&before), o(&after));
        assert_ne!(before.o, after.o);
    }

    #[test]
    fn heads_and_rows_can_be_permuted(p in problems(), seed: u64) {
        let value_heads = p.shape().value_heads;
        let p = Problem::new(p.rule(), Shape { heads: value_heads, ..p.shape() }).unwrap();
        let tensors = generated(&p, seed);
        let output = run(&p, &tensors);
        for (axis, n) in [(Axis::Heads, value_heads), (Axis::Batch, p.shape().batch)] {
            let reversed = (0..n).rev().collect::<Vec<_>>();
            let permuted = run(&p, &tensors.select(&p, axis, &reversed));
            assert_eq!(select(&p, Ident::O, &output.o, axis, &reversed), permuted.o);
            let states = select(&p, Ident::FinalState, &output.final_state, axis, &reversed);
            assert_eq!(states, permuted.final_state);
        }
    }

    #[test]
    fn linear_in_values_and_state(p in problems(), seed: u64) {
        let (a, b) = (generated(&p, seed), generated(&p, seed.wrapping_add(1)));
        let combined = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| 2.0 * x - 3.0 * y).collect::<Vec<_>>();
        let other = Tensors { v: b.v.clone(), initial_state: b.initial_state.clone(), ..a.clone() };
        let mut sum = a.clone();
        sum.v = combined(&a.v, &b.v);
        sum.initial_state = a.initial_state.as_ref().zip(b.initial_state.as_ref()).map(|(x, y)| combined(x, y));
        let (a, other, sum) = (run(&p, &a), run(&p, &other), run(&p, &sum));
        assert_close("o", &sum.o, &combined(&a.o, &other.o), 1e-11);
        assert_close("state", &sum.final_state, &combined(&a.final_state, &other.final_state), 1e-11);
    }

    #[test]
    fn the_state_does_not_grow_without_values(p in problems(), seed: u64) {
        let mut tensors = generated(&p, seed);
        tensors.v.fill(0.0);
        let one_token = with_tokens(&p, 1);
        let norms = |x: &[f64]| {
            let states = x.chunks_exact(p.shape().key_dim * p.shape().value_dim);
            states.map(|s| s.iter().map(|s| s * s).sum::<f64>()).collect::<Vec<_>>()
        };
        let mut state = tensors.initial_state.clone().unwrap();
        for t in 0..p.shape().tokens {
            let mut token = tensors.select(&p, Axis::Tokens, &[t]);
            token.initial_state = Some(state.clone());
            let after = run(&one_token, &token).final_state;
            assert!(norms(&state).iter().zip(norms(&after)).all(|(b, a)| a <= b * (1.0 + 1e-14)));
            state = after;
        }
    }

    #[test]
    fn kda_with_equal_channels_is_gated_deltanet(p in problems(), seed: u64) {
        let [gated, kda] = [Decay::Head, Decay::Channel]
            .map(|decay| Problem::new(Rule { decay, ..p.rule() }, p.shape()).unwrap());
        let tensors = generated(&gated, seed);
        let key_dim = p.shape().key_dim;
        let spread = |g: Vec<f64>| g.into_iter().flat_map(|g| std::iter::repeat_n(g, key_dim)).collect();
        let wide = Tensors { g: tensors.g.clone().map(spread), ..tensors.clone() };
        assert_eq!(run(&gated, &tensors), run(&kda, &wide));
        let (d, d_wide) = (gradients(&gated, &tensors), gradients(&kda, &wide));
        let summed = d_wide.g.unwrap().chunks_exact(key_dim).map(|g| g.iter().sum()).collect::<Vec<f64>>();
        assert_eq!((d.q, d.k, d.v, d.beta), (d_wide.q, d_wide.k, d_wide.v, d_wide.beta));
        assert_close("dg", &summed, &d.g.unwrap(), 1e-11);
    }

    #[test]
    fn a_gate_of_zero_is_no_gate(p in problems(), seed: u64) {
        let [none, head, channel] = [Decay::None, Decay::Head, Decay::Channel]
            .map(|decay| Problem::new(Rule { decay, ..p.rule() }, p.shape()).unwrap());
        let tensors = generated(&none, seed);
        for gated in [head, channel] {
            let open = Tensors { g: Some(vec![0.0; gated.len_of(Ident::G)]), ..tensors.clone() };
            assert_eq!(run(&none, &tensors), run(&gated, &open));
            let d = Gradients { g: None, ..gradients(&gated, &open) };
            assert_eq!(gradients(&none, &tensors), d);
        }
    }

    #[test]
    fn micro_steps_are_tokens_that_decay_once_and_are_read_last(p in problems(), seed: u64) {
        let tokens = p.shape().tokens;
        let product = Problem::new(Rule::gated_delta_product(2), p.shape()).unwrap();
        let plain = Problem::new(Rule::gated_deltanet(), Shape { tokens: 2 * tokens, ..p.shape() }).unwrap();
        let tensors = generated(&product, seed);
        let doubled = (0..tokens).flat_map(|t| [t, t]).collect::<Vec<_>>();
        let twice = |ident, x: &[f64]| select(&product, ident, x, Axis::Tokens, &doubled);
        let mut interleaved = tensors.clone();
        interleaved.q = twice(Ident::Q, &tensors.q);
        interleaved.g = tensors.g.as_ref().map(|g| twice(Ident::G, g));
        let heads = p.shape().value_heads;
        for (i, g) in interleaved.g.iter_mut().flatten().enumerate() {
            *g *= f64::from(i / heads % 2 == 0);
        }
        let (got, want) = (run(&product, &tensors), run(&plain, &interleaved));
        let odd = (0..tokens).map(|t| 2 * t + 1).collect::<Vec<_>>();
        assert_eq!(got.o, select(&plain, Ident::O, &want.o, Axis::Tokens, &odd));
        assert_eq!(got.final_state, want.final_state);
    }

    #[test]
    fn without_beta_the_state_only_decays(p in problems(), seed: u64) {
        let p = Problem::new(Rule { decay: Decay::Head, ..p.rule() }, p.shape()).unwrap();
        let Shape { batch, tokens, value_heads, key_dim, value_dim, .. } = p.shape();
        let mut tensors = generated(&p, seed);
        tensors.beta.fill(0.0);
        let output = run(&p, &tensors);
        let (g, s0) = (tensors.g.as_ref().unwrap(), tensors.initial_state.as_ref().unwrap());
        for n in 0..batch {
            for h in 0..value_heads {
                let mut total = 0.0;
                let cells = key_dim * value_dim;
                let s0 = &s0[(n * value_heads + h) * cells..][..cells];
                for t in 0..tokens {
                    let token = (n * tokens + t) * value_heads + h;
                    total += g[token];
                    let scale = (key_dim as f64).powf(-0.5) * total.exp();
                    let q = &tensors.q[((n * tokens + t) * p.shape().heads + p.key_head(h)) * key_dim..][..key_dim];
                    let want = (0..value_dim).map(|v| {
                        scale * (0..key_dim).map(|k| q[k] * s0[k * value_dim + v]).sum::<f64>()
                    });
                    let want = want.collect::<Vec<_>>();
                    let size = scale * s0.iter().map(|s| s * s).sum::<f64>().sqrt();
                    let got = &output.o[token * value_dim..][..value_dim];
                    assert!(got.iter().zip(&want).all(|(g, w)| (g - w).abs() <= 1e-12 * size));
                }
                let got = &output.final_state[(n * value_heads + h) * cells..][..cells];
                let want = s0.iter().map(|s| s * total.exp()).collect::<Vec<_>>();
                assert_close("state", got, &want, 1e-12);
            }
        }
    }

    #[test]
    fn a_gate_of_minus_infinity_forgets(p in problems(), at in 0..90usize, seed: u64) {
        prop_assume!(p.rule().decay != Decay::None);
        let tokens = p.shape().tokens;
        let at = at.min(tokens - 1);
        let mut tensors = generated(&p, seed);
        let row = p.len_of(Ident::G) / p.shape().batch;
        for g in tensors.g.as_mut().unwrap().chunks_exact_mut(row) {
            g[at * row / tokens..(at + 1) * row / tokens].fill(f64::NEG_INFINITY);
        }
        let part = |range: Range<usize>| tensors.select(&p, Axis::Tokens, &range.collect::<Vec<_>>());
        // What comes before learns nothing from what comes after, which starts from an empty state.
        let before = (with_tokens(&p, at), Tensors { d_final_state: None, ..part(0..at) });
        let after = (with_tokens(&p, tokens - at), Tensors { initial_state: None, ..part(at..tokens) });
        let (output, d) = (run(&p, &tensors), gradients(&p, &tensors));
        for (range, (p1, tensors)) in [(0..at, before), (at..tokens, after)] {
            assert_same_tokens(&p, (&output, &d), range, (&run(&p1, &tensors), &gradients(&p1, &tensors)));
        }
    }
}

#[test]
fn one_micro_step_is_the_plain_rule() {
    assert_eq!(Rule::delta_product(1), Rule::deltanet());
    assert_eq!(Rule::gated_delta_product(1), Rule::gated_deltanet());
}

#[test]
fn no_tokens_leave_the_state_alone() {
    for rule in RULES {
        let p = problem(rule, [2, 0, 1, 2, 3, 4]);
        let tensors = generated(&p, 1);
        let (output, d) = (run(&p, &tensors), gradients(&p, &tensors));
        assert!(output.o.is_empty());
        assert_eq!(Some(output.final_state), tensors.initial_state);
        assert_eq!(Some(d.initial_state), tensors.d_final_state);
    }
}
