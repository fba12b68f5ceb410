//! With the feature `cuda`: compiles the kernels of `kernels/` and embeds them, as PTX that any GPU since
//! Ampere can finish compiling, and as machine code for Hopper.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The oldest architecture the kernels are written for.
const BASELINE: &str = "compute_80";
const HOPPER: &str = "sm_90";

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if std::env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    println!("cargo:rerun-if-changed=kernels");
    for name in ["NVCC", "CUDA_HOME"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    if let Err(message) = compile_all() {
        println!("cargo:error={message}");
        std::process::exit(1);
    }
}

fn compile_all() -> Result<(), String> {
    let out = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    let mut sources: Vec<PathBuf> = std::fs::read_dir("kernels")
        .map_err(|e| format!("kernels/: {e}"))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "cu"))
        .collect();
    sources.sort();
    let mut modules = String::from("const MODULES: &[Module] = &[\n");
    for source in &sources {
        let stem = source.file_stem().unwrap_or_default().to_string_lossy();
        let (ptx, cubin) = (format!("{stem}.ptx"), format!("{stem}.cubin"));
        let running = [
            nvcc(source, &out.join(&ptx), &["-ptx", "-arch", BASELINE])?,
            nvcc(source, &out.join(&cubin), &["-cubin", "-arch", HOPPER])?,
        ];
        for mut running in running {
            let status = running.wait().map_err(|e| format!("nvcc: {e}"))?;
            if !status.success() {
                return Err(format!("nvcc failed on {}; its messages are above", source.display()));
            }
        }
        let at = |name: &str| format!("concat!(env!(\"OUT_DIR\"), \"/{name}\")");
        let _ = writeln!(
            modules,
            "    Module {{ name: {stem:?}, ptx: include_str!({}), hopper: include_bytes!({}) }},",
            at(&ptx),
            at(&cubin),
        );
    }
    modules.push_str("];\n");
    std::fs::write(out.join("modules.rs"), modules).map_err(|e| format!("modules.rs: {e}"))
}

fn nvcc(source: &Path, out: &Path, kind: &[&str]) -> Result<std::process::Child, String> {
    let found = std::env::var_os("NVCC").map(PathBuf::from).unwrap_or_else(|| {
        let home = std::env::var_os("CUDA_HOME").map(|home| Path::new(&home).join("bin/nvcc"));
        home.filter(|path| path.exists()).unwrap_or_else(|| "nvcc".into())
    });
    let mut command = Command::new(&found);
    command.args(["-std=c++17", "-O3"]).args(kind).arg("-o").arg(out).arg(source);
    command.spawn().map_err(|e| {
        format!(
            "the feature `cuda` needs NVIDIA's compiler, and {} cannot be started ({e}). Install the CUDA \
             toolkit, set NVCC or CUDA_HOME, or run scripts/cuda_toolkit.sh, which needs no GPU",
            found.display()
        )
    })
}
