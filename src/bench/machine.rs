//! The machine a result belongs to, and what this process costs it.

use serde::Serialize;

#[derive(Debug, Clone, Serialize)]
pub struct Machine {
    /// Processor name, where the system tells it.
    pub cpu: Option<String>,
    /// Cores this process may use.
    pub cores: usize,
    pub memory_mib: Option<u64>,
    pub os: &'static str,
    pub arch: &'static str,
}

impl Machine {
    /// The one this runs on.
    pub fn here() -> Self {
        let field = |path: &str, name: &str| {
            let text = std::fs::read_to_string(path).ok()?;
            let line = text.lines().find(|line| line.starts_with(name))?;
            Some(line.split_once(':')?.1.trim().to_owned())
        };
        let memory = field("/proc/meminfo", "MemTotal");
        Self {
            cpu: field("/proc/cpuinfo", "model name"),
            cores: std::thread::available_parallelism().map_or(1, |n| n.get()),
            memory_mib: memory
                .and_then(|text| text.split(' ').next()?.parse::<u64>().ok())
                .map(|kib| kib / 1024),
            os: std::env::consts::OS,
            arch: std::env::consts::ARCH,
        }
    }
}

/// Processor seconds this process has used, all threads together.
pub fn cpu_seconds() -> Option<f64> {
    #[cfg(unix)]
    {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the pointer is to a live timespec, which the call fills in.
        let result = unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
        (result == 0).then_some(time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9)
    }
    #[cfg(not(unix))]
    None
}
