use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use delta_rule::{Decay, Options, Problem, Rule, Shape};
use safetensors::{Dtype, SafeTensors};

use super::Tensors;

/// A problem from a file, with results that were found outside this crate.
pub(crate) struct Case {
    pub(crate) name: String,
    pub(crate) problem: Problem,
    pub(crate) options: Options,
    pub(crate) tensors: Tensors<f64>,
    /// By name: `o`, `final_state`, and gradients under the names of their inputs.
    pub(crate) expect: BTreeMap<String, Vec<f64>>,
    /// How far flash-linear-attention is from `expect`, as rms(err)/rms(truth), under the same names.
    pub(crate) fla_error: BTreeMap<String, f64>,
}

/// All cases: those of the repository and, where they exist, those in `../shared/cases`.
pub(crate) fn all() -> impl Iterator<Item = Case> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = BTreeMap::new();
    for folder in [root.join("../shared/cases"), root.join("tests/cases")] {
        for file in std::fs::read_dir(folder).into_iter().flatten() {
            let file = file.expect("a readable folder");
            if file.path().extension().is_some_and(|e| e == "safetensors") {
                files.insert(file.file_name(), file.path());
            }
        }
    }
    assert!(!files.is_empty(), "no cases found");
    files.into_values().map(|path| load(&path))
}

pub(crate) fn load(path: &PathBuf) -> Case {
    let bytes = std::fs::read(path).expect("a readable case");
    let file = SafeTensors::deserialize(&bytes).expect("a safetensors file");
    let (_, header) = SafeTensors::read_metadata(&bytes).expect("a safetensors header");
    let metadata = header.metadata().clone().expect("metadata");

    let problem = read_problem(&file, &metadata);
    let options = Options::new().with_scale(metadata["scale"].parse().expect("a number"));
    let optional = |name: &str| file.tensor(name).is_ok().then(|| floats(&file, name));
    let tensors = Tensors {
        q: floats(&file, "q"),
        k: floats(&file, "k"),
        v: floats(&file, "v"),
        beta: floats(&file, "beta"),
        g: optional("g"),
        a_log: None,
        dt_bias: None,
        initial_state: optional("initial_state"),
        d_o: floats(&file, "do"),
        d_final_state: optional("dht"),
    };
    let expected = file.names().into_iter().filter_map(|name| Some((name, name.strip_prefix("expect.")?)));
    let errors = metadata.iter().filter_map(|(name, error)| Some((name.strip_prefix("fla_error.")?, error)));
    Case {
        name: path.file_stem().expect("a file name").to_string_lossy().into_owned(),
        problem,
        options,
        tensors,
        expect: expected.map(|(name, tensor)| (our_name(tensor), floats(&file, name))).collect(),
        fla_error: errors.map(|(name, e)| (our_name(name), e.parse().expect("a number"))).collect(),
    }
}

/// The files say `dq` and `dh0`, here gradients carry the names of their inputs.
fn our_name(name: &str) -> String {
    match name {
        "o" | "final_state" => name.into(),
        "dh0" => "initial_state".into(),
        _ => name.strip_prefix('d').expect("a gradient").into(),
    }
}

fn read_problem(file: &SafeTensors<'_>, metadata: &HashMap<String, String>) -> Problem {
    let shape = |name: &str| file.tensor(name).expect("a tensor").shape().to_vec();
    let (q, v) = (shape("q"), shape("v"));
    let shape =
        Shape { batch: q[0], tokens: q[1], heads: q[2], value_heads: v[2], key_dim: q[3], value_dim: v[3] };
    let decay = match file.tensor("g").map(|g| g.shape().len()) {
        Err(_) => Decay::None,
        Ok(3) => Decay::Head,
        Ok(_) => Decay::Channel,
    };
    let rule = Rule { decay, micro_steps: metadata["n_h"].parse().expect("a number") };
    let problem = Problem::new(rule, shape).expect("a valid shape");
    match file.tensor("cu_seqlens") {
        Ok(cu) => {
            let cu = cu.data().as_chunks::<8>().0.iter().map(|&b| i64::from_le_bytes(b) as usize);
            problem.with_cu_seqlens(&cu.collect::<Vec<_>>()).expect("a valid packing")
        }
        Err(_) => problem,
    }
}

fn floats(file: &SafeTensors<'_>, name: &str) -> Vec<f64> {
    let tensor = file.tensor(name).expect("a tensor");
    let data = tensor.data();
    match tensor.dtype() {
        Dtype::F32 => data.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b).into()).collect(),
        Dtype::BF16 => data.as_chunks::<2>().0.iter().map(|&b| half::bf16::from_le_bytes(b).into()).collect(),
        other => panic!("{name} is {other:?}"),
    }
}
