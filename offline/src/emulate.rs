//! Runs a generated kernel on the CPU: see `emulator.hpp`.

use std::collections::HashMap;
use std::ffi::c_void;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Mutex;

use libloading::{Library, Symbol};

use crate::Generated;

type Entry = unsafe extern "C" fn(*const *mut c_void, *const c_void, u32, u32, u32, u32, bool) -> bool;

/// A kernel compiled for the host.
pub(crate) struct Emulated {
    library: Library,
}

/// Kernels by the sorted lines of their source: compiling one takes seconds, and the generator lists types in any
/// order.
static COMPILED: Mutex<Option<HashMap<String, Emulated>>> = Mutex::new(None);

/// Whether there is the host's C++ compiler, `g++`.
pub fn can_emulate() -> bool {
    Command::new("g++").arg("--version").output().is_ok()
}

/// Runs `kernel` on buffers in host memory.
///
/// # Errors
/// What the C++ compiler printed, or that a cube waits for ever.
pub(crate) fn run(
    kernel: &Generated,
    cubes: (u32, u32, u32),
    buffers: &[*mut c_void],
    info: &[u64],
    backwards: bool,
) -> Result<(), String> {
    let mut compiled = COMPILED.lock().map_err(|e| e.to_string())?;
    let compiled = compiled.get_or_insert_default();
    let mut lines: Vec<&str> = kernel.source.lines().collect();
    lines.sort_unstable();
    let key = lines.join("\n");
    if !compiled.contains_key(&key) {
        compiled.insert(key.clone(), compile(kernel, compiled.len())?);
    }
    let library = &compiled[&key].library;
    // Safety: `compile` has defined the symbol with this type, and the kernels stay inside their buffers, as the
    // front door has checked.
    let ended = unsafe {
        let entry: Symbol<Entry> = library.get(b"emulate").map_err(|e| e.to_string())?;
        let (x, y, z) = cubes;
        entry(buffers.as_ptr(), info.as_ptr().cast(), x, y, z, kernel.units, backwards)
    };
    if ended { Ok(()) } else { Err(format!("{}: a cube waits for ever", kernel.name)) }
}

fn compile(kernel: &Generated, number: usize) -> Result<Emulated, String> {
    let folder = folder()?;
    let source = folder.join(format!("{number}.cpp"));
    let library = folder.join(format!("{number}.so"));
    std::fs::write(&source, host_source(kernel)?).map_err(|e| e.to_string())?;
    let output = Command::new("g++")
        .args(["-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-mf16c", "-mfma", "-ffp-contract=off", "-I"])
        .arg(&folder)
        .arg(&source)
        .arg("-o")
        .arg(&library)
        .output()
        .map_err(|e| format!("g++: {e}"))?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        return Err(format!("{}: {}", kernel.name, text.lines().take(20).collect::<Vec<_>>().join("\n")));
    }
    // Safety: the library only defines functions and plain data.
    let library = unsafe { Library::new(&library) }.map_err(|e| e.to_string())?;
    Ok(Emulated { library })
}

/// A folder of this process with the machine under the names of the headers that kernels include.
fn folder() -> Result<PathBuf, String> {
    let folder = std::env::temp_dir().join(format!("delta_rule_emulator_{}", std::process::id()));
    std::fs::create_dir_all(&folder).map_err(|e| e.to_string())?;
    let write = |name: &str, text: &str| std::fs::write(folder.join(name), text).map_err(|e| e.to_string());
    write("emulator.hpp", include_str!("emulator.hpp"))?;
    for header in ["cuda_runtime.h", "cuda_bf16.h", "cuda_fp16.h", "mma.h"] {
        write(header, "#include \"emulator.hpp\"\n")?;
    }
    Ok(folder)
}

/// The source with the wrappers of PTX instructions taken out, and an entry that runs a grid.
fn host_source(kernel: &Generated) -> Result<String, String> {
    let source = &kernel.source;
    let missing = |what: &str| format!("{}: no {what} in the source", kernel.name);
    let main = source.find("extern \"C\" __global__").ok_or_else(|| missing("kernel"))?;
    let wrappers = source.find("inline __device__").filter(|&at| at < main).unwrap_or(main);
    let text = &source[main..];
    let open = text.find("(\n").ok_or_else(|| missing("parameter list"))?;
    let close = text.find(") {").ok_or_else(|| missing("body"))?;
    let parameters = &text[open + 1..close];
    let arguments: Vec<String> = parameters
        .split(',')
        .enumerate()
        .map(|(i, parameter)| {
            let kind = parameter.trim().rsplit_once(' ').map_or("", |(kind, _)| kind);
            let kind = kind.replace("__restrict__", "").replace("__grid_constant__", "");
            if kind.contains("info_st") {
                "*(const info_st*)info".into()
            } else {
                format!("({})buffers[{i}]", kind.trim())
            }
        })
        .collect();
    Ok(format!(
        "{}{}\nextern \"C\" bool emulate(void* const* buffers, const void* info, unsigned x, unsigned y, unsigned z, \
         unsigned units, bool backwards) {{\n    return run_grid(x, y, z, units, {}, backwards, [&] {{ {}({}); }});\n}}\n",
        &source[..wrappers],
        text,
        kernel.shared_memory,
        kernel.name,
        arguments.join(", ")
    ))
}
