//! NVRTC and `ptxas`, as CubeCL and the driver call them.

use std::path::PathBuf;
use std::process::Command;

use cudarc::nvrtc::{CompileOptions, compile_ptx_with_opts};

use crate::Generated;

/// What `ptxas` says of a kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Compiled {
    /// Registers per unit.
    pub registers: u32,
    /// Bytes spilled to and reloaded from local memory.
    pub spills: u32,
    /// Bytes of stack, which an array indexed at run time would need.
    pub stack: u32,
}

/// `$CUDA_PATH`, if it holds headers and `ptxas`, and NVRTC can be loaded.
pub fn toolchain() -> Option<PathBuf> {
    let root = PathBuf::from(std::env::var_os("CUDA_PATH")?);
    let complete = root.join("include/cuda_runtime.h").exists() && root.join("bin/ptxas").exists();
    // Safety: this only asks whether the library can be opened.
    (complete && unsafe { cudarc::nvrtc::sys::is_culib_present() }).then_some(root)
}

/// Compiles a kernel for sm_90a.
///
/// # Errors
/// What NVRTC or `ptxas` printed.
pub fn compile(root: &std::path::Path, kernel: &Generated) -> Result<Compiled, String> {
    let include = root.join("include");
    let options = CompileOptions {
        options: vec![
            "--gpu-architecture=sm_90a".into(),
            format!("--include-path={}", include.display()),
            "-lineinfo".into(),
            format!("--include-path={}", include.join("cccl").display()),
        ],
        ..Default::default()
    };
    let ptx =
        compile_ptx_with_opts(&kernel.source, options).map_err(|e| format!("{}: {e:?}", kernel.name))?;
    let id = format!("delta_rule_{}_{:?}.ptx", std::process::id(), std::thread::current().id());
    let file = std::env::temp_dir().join(id);
    std::fs::write(&file, ptx.to_src()).map_err(|e| e.to_string())?;
    let output = Command::new(root.join("bin/ptxas"))
        .args(["-v", "-arch=sm_90a", "-o", "/dev/null"])
        .arg(&file)
        .output()
        .map_err(|e| e.to_string())?;
    let _ = std::fs::remove_file(&file);
    let report = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        return Err(format!("{}: {report}", kernel.name));
    }
    parse(&report).ok_or_else(|| format!("{}: no figures in {report}", kernel.name))
}

fn parse(report: &str) -> Option<Compiled> {
    let before = |what: &str| -> Option<u32> {
        let at = report.find(what)?;
        report[..at].split_whitespace().next_back()?.parse().ok()
    };
    Some(Compiled {
        registers: before(" registers")?,
        spills: before(" bytes spill stores")? + before(" bytes spill loads")?,
        stack: before(" bytes stack frame")?,
    })
}
