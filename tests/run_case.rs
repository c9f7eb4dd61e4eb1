//! Stored cases: good ones are read, broken ones are refused with a message that names what is wrong.

#[path = "../examples/common/args.rs"]
#[expect(dead_code, reason = "a test has no command line")]
mod args;
#[path = "../examples/common/case.rs"]
mod case;
#[path = "../examples/common/file.rs"]
mod file;
#[path = "../examples/common/tensors.rs"]
#[expect(dead_code, reason = "nothing is run here")]
mod tensors;

use std::collections::HashMap;

use case::Case;
use delta_rule::Rule;
use safetensors::{Dtype, serialize, tensor::TensorView};

/// A case under construction: 1 row of 3 tokens, 1 head, K = 2, V = 4.
#[derive(Clone)]
struct Draft {
    metadata: HashMap<String, String>,
    tensors: Vec<(&'static str, Dtype, Vec<usize>, Vec<u8>)>,
}

impl Draft {
    fn new(rule: &str, n_h: usize) -> Self {
        let metadata = [("rule", rule.to_string()), ("n_h", n_h.to_string())];
        let metadata = metadata.map(|(key, value)| (key.to_string(), value)).into();
        let steps = 3 * n_h;
        Self { metadata, tensors: Vec::new() }
            .bf16("q", &[1, 3, 1, 2])
            .bf16("k", &[1, steps, 1, 2])
            .bf16("v", &[1, steps, 1, 4])
            .bf16("beta", &[1, steps, 1])
            .f32("expect.o", &[1, 3, 1, 4])
            .f32("expect.final_state", &[1, 1, 2, 4])
    }

    fn set(mut self, name: &'static str, dtype: Dtype, shape: &[usize], data: Vec<u8>) -> Self {
        self.tensors.retain(|tensor| tensor.0 != name);
        self.tensors.push((name, dtype, shape.to_vec(), data));
        self
    }

    fn bf16(self, name: &'static str, shape: &[usize]) -> Self {
        let one = half::bf16::ONE.to_le_bytes();
        let data = one.repeat(shape.iter().product());
        self.set(name, Dtype::BF16, shape, data)
    }

    fn f32(self, name: &'static str, shape: &[usize]) -> Self {
        let data = 0.5f32.to_le_bytes().repeat(shape.iter().product());
        self.set(name, Dtype::F32, shape, data)
    }

    fn cu_seqlens(self, offsets: &[i64]) -> Self {
        let data = offsets.iter().flat_map(|x| x.to_le_bytes()).collect();
        self.set("cu_seqlens", Dtype::I64, &[offsets.len()], data)
    }

    fn without(mut self, name: &str) -> Self {
        self.tensors.retain(|tensor| tensor.0 != name);
        self
    }

    fn meta(mut self, key: &str, value: &str) -> Self {
        self.metadata.insert(key.into(), value.into());
        self
    }

    fn bytes(&self) -> Vec<u8> {
        let views = self.tensors.iter().map(|(name, dtype, shape, data)| {
            (*name, TensorView::new(*dtype, shape.clone(), data).expect("shape and data agree"))
        });
        serialize(views, Some(self.metadata.clone())).expect("the draft is well formed")
    }

    fn parse(&self) -> Case {
        Case::parse(&self.bytes()).expect("the case is good")
    }

    fn refused(&self, part: &str) {
        refused(&self.bytes(), part);
    }
}

#[track_caller]
fn refused(bytes: &[u8], part: &str) {
    let message = Case::parse(bytes).expect_err("the case is broken").to_string();
    assert!(message.contains(part), "{message:?} does not say {part:?}");
    assert!(!message.contains('\n'), "{message:?} is not one line");
}

#[test]
fn reads_a_plain_case() {
    let case = Draft::new("deltanet", 1).meta("fla_error.o", "3.5e-03").parse();
    assert_eq!((case.rule.as_str(), case.problem.rule()), ("deltanet", Rule::deltanet()));
    assert_eq!(case.options.scale, None);
    assert_eq!(case.tensors.q, vec![1.0; 6]);
    assert!(case.tensors.g.is_none() && case.d_output.is_none() && case.d_state.is_none());
    let expected: Vec<_> = case.expected.iter().map(|e| (e.name, e.truth.len(), e.fla)).collect();
    assert_eq!(expected, [("o", 12, Some(3.5e-3)), ("final_state", 8, None)]);
}

#[test]
fn reads_every_rule_from_its_gate_and_steps() {
    let rule = |draft: Draft| draft.parse().problem.rule();
    assert_eq!(rule(Draft::new("gated_deltanet", 1).f32("g", &[1, 3, 1])), Rule::gated_deltanet());
    assert_eq!(rule(Draft::new("kda", 1).f32("g", &[1, 3, 1, 2])), Rule::kda());
    assert_eq!(rule(Draft::new("deltaproduct", 2)), Rule::delta_product(2));
    assert_eq!(rule(Draft::new("deltaproduct", 2).f32("g", &[1, 3, 1])), Rule::gated_delta_product(2));
}

#[test]
fn reads_packed_sequences_scale_and_gradients() {
    let offsets = [0i32, 1, 3].iter().flat_map(|x| x.to_le_bytes()).collect();
    let case = Draft::new("deltanet", 1)
        .set("cu_seqlens", Dtype::I32, &[3], offsets)
        .f32("expect.final_state", &[2, 1, 2, 4])
        .f32("initial_state", &[2, 1, 2, 4])
        .f32("dht", &[2, 1, 2, 4])
        .bf16("do", &[1, 3, 1, 4])
        .f32("expect.dk", &[1, 3, 1, 2])
        .meta("scale", "0.25")
        .parse();
    assert_eq!(case.problem.cu_seqlens(), Some(&[0, 1, 3][..]));
    assert_eq!(case.options.scale, Some(0.25));
    assert_eq!(case.tensors.initial_state, Some(vec![0.5; 16]));
    assert!(case.d_output.is_some() && case.d_state.is_some());
    assert_eq!(case.expected.iter().map(|e| e.name).collect::<Vec<_>>(), ["o", "final_state", "dk"]);
}

#[test]
fn refuses_any_truncation() {
    let bytes = Draft::new("deltanet", 1).bytes();
    for len in 0..bytes.len() {
        refused(&bytes[..len], "not a complete safetensors file");
    }
    refused(&[0xff; 64], "not a complete safetensors file");
}

#[test]
fn survives_any_changed_byte() {
    let draft = Draft::new("deltaproduct", 2).f32("g", &[1, 3, 1]).cu_seqlens(&[0, 1, 3]);
    let draft = draft.f32("expect.final_state", &[2, 1, 2, 4]);
    draft.parse();
    let bytes = draft.bytes();
    for at in 0..bytes.len() {
        for value in *b"\x00\xff09\"[{" {
            let mut changed = bytes.clone();
            changed[at] = value;
            // Some changes leave a good case; none may panic.
            let _ = Case::parse(&changed);
        }
    }
}

#[test]
fn refuses_missing_and_unknown_tensors() {
    for name in ["q", "k", "v", "beta", "expect.o", "expect.final_state"] {
        Draft::new("deltanet", 1).without(name).refused(&format!("tensor {name} is missing"));
    }
    Draft::new("kda", 1).refused("tensor g is missing");
    Draft::new("deltanet", 1).f32("expect.dq", &[1, 3, 1, 2]).refused("tensor do is missing");
    Draft::new("deltanet", 1).f32("inital_state", &[1, 1, 2, 4]).refused("inital_state: no such tensor");
    Draft::new("deltanet", 1).f32("g", &[1, 3, 1]).refused("deltanet has no decay");
}

#[test]
fn refuses_wrong_shapes_and_types() {
    let good = Draft::new("deltanet", 1);
    good.clone().bf16("q", &[3, 1, 2]).refused("q: expected 4 dimensions");
    good.clone().bf16("beta", &[1, 3, 2]).refused("beta: expected shape [1, 3, 1]");
    good.clone().bf16("k", &[1, 3, 1, 3]).refused("k: expected shape [1, 3, 1, 2]");
    good.clone().bf16("v", &[1, 3, 0, 4]).refused("value heads");
    good.clone().f32("expect.o", &[1, 3, 1, 3]).refused("expect.o: expected shape");
    good.clone().f32("initial_state", &[1, 1, 4, 2]).refused("initial_state: expected shape");
    good.clone().set("q", Dtype::I32, &[1, 3, 1, 2], vec![0; 24]).refused("q: expected floating point");
    good.clone().bf16("q", &[1, 3, 0, 2]).refused("heads (H)");
    Draft::new("kda", 1).f32("g", &[1, 3, 1]).refused("g: expected shape [1, 3, 1, 2]");
}

#[test]
fn refuses_bad_offsets() {
    let good = Draft::new("deltanet", 1);
    for offsets in [&[1, 3][..], &[0, 2], &[0, 2, 1, 3], &[0, 4], &[0], &[]] {
        good.clone().cu_seqlens(offsets).refused("cu_seqlens must start at 0");
    }
    good.clone().cu_seqlens(&[0, -1, 3]).refused("an offset is negative");
    good.clone().set("cu_seqlens", Dtype::I64, &[1, 2], vec![0; 16]).refused("expected one dimension");
    good.clone().f32("cu_seqlens", &[2]).refused("cu_seqlens: expected i64 or i32");
    good.clone().cu_seqlens(&[0, 1, 3]).refused("expect.final_state: expected shape [2, 1, 2, 4]");
}

#[test]
fn refuses_bad_metadata() {
    let good = Draft::new("deltanet", 1);
    good.clone().meta("rule", "deltanets").refused("unknown rule \"deltanets\"");
    for n_h in ["NaN", "0", "-1", "1.5", ""] {
        good.clone().meta("n_h", n_h).refused("metadata n_h: expected a whole number");
    }
    good.clone().meta("n_h", "2").refused("one step per token");
    good.clone().meta("scale", "NaN").refused("metadata scale: expected a finite number");
    good.clone().meta("fla_error.o", "small").refused("metadata fla_error.o");
    Draft::new("deltaproduct", 2).meta("n_h", "3").refused("k has 6 rows, not T * n_h = 3 * 3");
    Draft::new("deltaproduct", 2).meta("n_h", "18446744073709551615").refused("k has 6 rows");
    let mut unnamed = good;
    unnamed.metadata.remove("rule");
    unnamed.refused("metadata rule is missing");
}
