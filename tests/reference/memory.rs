//! What the state remembers, and what it can compute.

use delta_rule::reference::forward;
use delta_rule::{Options, Rule};

use crate::common::{Generator, assert_close, problem};

/// Rows that are orthonormal, by Gram-Schmidt.
fn orthonormal(n: usize, seed: u64) -> Vec<f64> {
    let mut x = Generator::new(seed).normals(n * n);
    for i in 0..n {
        let (done, rest) = x.split_at_mut(i * n);
        let row = &mut rest[..n];
        for other in done.chunks_exact(n) {
            let along = other.iter().zip(&*row).map(|(a, b)| a * b).sum::<f64>();
            row.iter_mut().zip(other).for_each(|(r, o)| *r -= along * o);
        }
        let norm = row.iter().map(|x| x * x).sum::<f64>().sqrt();
        row.iter_mut().for_each(|x| *x /= norm);
    }
    x
}

#[test]
fn orthonormal_keys_recall_exactly() {
    let n = 8;
    let p = problem(Rule::deltanet(), [1, 2 * n, 1, 1, n, 3]);
    let mut tensors = Generator::new(1).tensors(&p, &Options::new());
    // All pairs are written first, then each is asked for.
    let keys = orthonormal(n, 2);
    tensors.k = [&keys[..], &keys].concat();
    tensors.q = tensors.k.clone();
    tensors.beta = (0..2 * n).map(|t| f64::from(t < n)).collect();
    tensors.initial_state = None;
    let output = forward(&p, &Options::new().with_scale(1.0), &tensors.inputs()).unwrap();
    assert_close("recalled", &output.o[n * 3..], &tensors.v[..n * 3], 1e-13);
}

#[test]
fn rewriting_a_key_overwrites() {
    let p = problem(Rule::deltanet(), [1, 5, 1, 1, 4, 3]);
    let mut tensors = Generator::new(1).tensors(&p, &Options::new());
    tensors.k = tensors.k[..4].repeat(5);
    tensors.q = tensors.k.clone();
    tensors.beta.fill(1.0);
    let output = forward(&p, &Options::new().with_scale(1.0), &tensors.inputs()).unwrap();
    assert_close("read", &output.o, &tensors.v, 1e-13);
}

/// With $\beta = 2$ and $k = (e_a - e_b) / \sqrt 2$ a write without a value swaps rows a and b of the state:
/// four of them per token reach every element of S5, and the state holds the product of all of them.
#[test]
fn permutation_word_problem() {
    let (tokens, n, n_h) = (512, 5, 4);
    let p = problem(Rule::delta_product(n_h), [1, tokens, 1, 1, n, n]);
    let mut random = Generator::new(7);
    let mut tensors = Generator::new(8).tensors(&p, &Options::new());
    tensors.v.fill(0.0);
    tensors.beta.fill(0.0);
    tensors.k.fill(0.0);
    tensors.q.fill(0.0);
    tensors.initial_state = Some((0..n * n).map(|i| f64::from(i % (n + 1) == 0)).collect());
    let mut rows: Vec<_> = (0..n).collect();
    let mut want = vec![0.0; tokens * n];
    for t in 0..tokens {
        for step in t * n_h..t * n_h + random.below(n_h + 1) {
            let a = random.below(n);
            let b = (a + 1 + random.below(n - 1)) % n;
            tensors.beta[step] = 2.0;
            tensors.k[step * n + a] = 0.5f64.sqrt();
            tensors.k[step * n + b] = -(0.5f64.sqrt());
            rows.swap(a, b);
        }
        let asked = random.below(n);
        tensors.q[t * n + asked] = 1.0;
        want[t * n + rows[asked]] = 1.0;
    }
    let output = forward(&p, &Options::new().with_scale(1.0), &tensors.inputs()).unwrap();
    assert_close("o", &output.o, &want, 1e-11);
}
