//! Compiling a source of `kernels/` into a shared library, once per content.

use std::collections::HashMap;
use std::ffi::{CStr, CString, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, OnceLock};

use sha2::{Digest, Sha256};

const FLAGS: [&str; 9] = [
    "-std=c++17",
    "-O2",
    "-g1",
    "-ffp-contract=off",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-fno-strict-aliasing",
    "-U_FORTIFY_SOURCE",
];

/// A source of `kernels/` or beside a test. Compiled and loaded when it is first run here; never unloaded.
#[derive(Clone)]
pub struct Library {
    source: String,
    loaded: Arc<OnceLock<Loaded>>,
}

struct Loaded {
    handle: Handle,
    path: PathBuf,
}

struct Handle(*mut c_void);
// SAFETY: a handle of dlopen may be used from any thread.
unsafe impl Send for Handle {}
unsafe impl Sync for Handle {}

impl Library {
    /// `source` is relative to the repository. Compiled unless the same content was before.
    pub fn of(source: &str) -> Self {
        static KNOWN: OnceLock<Mutex<HashMap<String, Library>>> = OnceLock::new();
        let mut known = KNOWN.get_or_init(Mutex::default).lock().unwrap();
        let new = || Self { source: source.to_owned(), loaded: Arc::default() };
        known.entry(source.to_owned()).or_insert_with(new).clone()
    }

    /// Whether these are kernels that the program has, too: not a twin, not a test's own.
    pub fn is_of_the_program(&self) -> bool {
        self.source.starts_with("kernels/") && self.source.ends_with(".cu")
    }

    /// The address of a symbol that must be there.
    pub fn symbol(&self, name: &str) -> *mut c_void {
        let loaded = self.loaded.get_or_init(|| open(compile(&self.source)));
        let symbol = CString::new(name).unwrap();
        // SAFETY: the handle is open, the name ends with a zero.
        let address = unsafe { libc::dlsym(loaded.handle.0, symbol.as_ptr()) };
        assert!(!address.is_null(), "{} has no {name}", loaded.path.display());
        address
    }
}

fn open(path: PathBuf) -> Loaded {
    let name = CString::new(path.to_str().unwrap()).unwrap();
    // SAFETY: the library runs no code on loading.
    let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    if handle.is_null() {
        // SAFETY: dlopen failed, so dlerror has a text.
        let error = unsafe { CStr::from_ptr(libc::dlerror()) };
        panic!("{}: {}", path.display(), error.to_string_lossy());
    }
    Loaded { handle: Handle(handle), path }
}

fn compile(source: &str) -> PathBuf {
    // Where cargo runs tests; a test that was built elsewhere runs in a checkout's root as well.
    let root = Path::new("");
    let (compiler, version) = compiler();
    let mut digest = Sha256::new();
    digest.update(version);
    digest.update(FLAGS.join(" "));
    let mut files = vec![root.join(source)];
    headers(&root.join("kernels"), &mut files);
    for file in &files {
        digest.update(file.to_str().unwrap());
        digest.update(std::fs::read(file).unwrap());
    }
    let digest: String = digest.finalize()[..8].iter().map(|byte| format!("{byte:02x}")).collect();
    let folder = std::env::current_dir().unwrap().join("target/tmp/kernels");
    std::fs::create_dir_all(&folder).unwrap();
    let stem = source.replace(['/', '.'], "_");
    let library = folder.join(format!("{stem}-{digest}.so"));
    if library.exists() {
        return library;
    }
    for old in std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()) {
        let name = old.file_name().unwrap().to_string_lossy().into_owned();
        if name.strip_prefix(&format!("{stem}-")).is_some_and(|rest| !rest.contains('-')) {
            let _ = std::fs::remove_file(old); // of another content; another process may be first
        }
    }
    // Written aside and renamed, so that no other process loads half a library.
    let partial = folder.join(format!("{stem}-{digest}-{}.so", std::process::id()));
    let output = Command::new(&compiler)
        .args(FLAGS)
        .args(["-x", "c++"])
        .arg(root.join(source))
        .arg("-I")
        .arg(root.join("kernels"))
        .arg("-o")
        .arg(&partial)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{compiler} cannot compile {source}:\n{text}");
    std::fs::rename(&partial, &library).unwrap();
    library
}

/// Everything that a source may include.
fn headers(folder: &Path, files: &mut Vec<PathBuf>) {
    let mut entries: Vec<_> =
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    entries.sort();
    for path in entries {
        if path.is_dir() {
            headers(&path, files);
        } else if path.extension().is_some_and(|kind| kind == "cuh" || kind == "hpp") {
            files.push(path);
        }
    }
}

/// The compiler and what it says its version is.
fn compiler() -> (String, Vec<u8>) {
    let named = std::env::var("CXX").ok();
    let candidates: Vec<&str> = match &named {
        Some(named) => vec![named],
        None => vec!["c++", "g++", "clang++"],
    };
    for candidate in &candidates {
        if let Ok(output) = Command::new(candidate).arg("--version").output()
            && output.status.success()
        {
            return ((*candidate).to_owned(), output.stdout);
        }
    }
    panic!(
        "the kernels are checked with a C++17 compiler, and none of {candidates:?} runs: install g++ or \
         clang++ (Debian: apt-get install g++), or name one in CXX"
    );
}
