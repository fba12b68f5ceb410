//! Stopping a run by a signal: the first lets it save, the second ends it at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use crate::cli::CliError;

/// Exit codes as shells give them: 128 and the number of the signal.
const INTERRUPTED: u8 = 130;
const TERMINATED: u8 = 143;

/// Whether a signal asked the run to stop.
pub struct Stop(Arc<AtomicU8>);

impl Stop {
    /// From now on SIGINT (Ctrl-C) and SIGTERM no longer end the process by themselves.
    pub fn watch() -> Result<Self, CliError> {
        let cannot = |source| CliError::System { what: "cannot watch for signals", source };
        let tokio =
            tokio::runtime::Builder::new_current_thread().enable_io().build().map_err(cannot)?;
        // Registered here, so that a signal right after this call is seen.
        let mut signals = tokio.block_on(async { Signals::new() }).map_err(cannot)?;
        let asked = Arc::new(AtomicU8::new(0));
        let seen = Arc::clone(&asked);
        let watch = move || {
            tokio.block_on(async {
                seen.store(signals.next().await, Ordering::Relaxed);
                std::process::exit(signals.next().await.into());
            });
        };
        std::thread::Builder::new().name("signals".to_owned()).spawn(watch).map_err(cannot)?;
        Ok(Self(asked))
    }

    /// The exit code of the signal that came, if one did.
    pub fn asked(&self) -> Option<u8> {
        Some(self.0.load(Ordering::Relaxed)).filter(|code| *code != 0)
    }
}

#[cfg(unix)]
struct Signals {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
}

#[cfg(unix)]
impl Signals {
    fn new() -> std::io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }

    async fn next(&mut self) -> u8 {
        tokio::select! {
            _ = self.interrupt.recv() => INTERRUPTED,
            _ = self.terminate.recv() => TERMINATED,
        }
    }
}

#[cfg(windows)]
struct Signals {
    interrupt: tokio::signal::windows::CtrlC,
    close: tokio::signal::windows::CtrlClose,
}

#[cfg(windows)]
impl Signals {
    fn new() -> std::io::Result<Self> {
        use tokio::signal::windows::{ctrl_c, ctrl_close};
        Ok(Self { interrupt: ctrl_c()?, close: ctrl_close()? })
    }

    async fn next(&mut self) -> u8 {
        tokio::select! {
            _ = self.interrupt.recv() => INTERRUPTED,
            _ = self.close.recv() => TERMINATED,
        }
    }
}
