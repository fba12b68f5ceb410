//! Who may use the server: options, the environment, and what to say about them.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use serde::{Deserialize, Serialize};

use super::CliError;
use crate::api::{Access, ImplicitLoad, KeySources, Origin};

/// Options of access.
#[derive(Debug, Clone, Default, Args, Serialize, Deserialize)]
#[command(next_help_heading = "Access (keys also from CARTOUCHE_API_KEY and CARTOUCHE_ADMIN_KEY)")]
pub struct AccessOptions {
    /// File of API keys: one a line, or a .yaml or .json list of {name, key or sha256, role, cartridges,
    /// cache_salt, force_redownload}. With any key set, every route but health needs one. Read again when
    /// it changes, or at SIGHUP
    #[arg(long, env = "CARTOUCHE_API_KEY_FILE")]
    api_key_file: Option<PathBuf>,
    /// The same for keys that may load, replace and delete cartridges
    #[arg(long, env = "CARTOUCHE_ADMIN_KEY_FILE")]
    admin_key_file: Option<PathBuf>,
    /// Web pages that may use the API, as scheme://host[:port], or * for all; may be repeated
    /// [default: none]
    #[arg(long, env = "CARTOUCHE_CORS_ORIGIN", value_delimiter = ',')]
    cors_origin: Option<Vec<String>>,
    /// What requests may load: off (only what an admin loaded is used), local (files of --cartridge-dir), or
    /// any (also fetched from the source they name) [default: any]
    #[arg(long, env = "CARTOUCHE_IMPLICIT_LOAD")]
    implicit_load: Option<String>,
}

/// What the options come to.
pub struct Opened {
    pub access: Arc<Access>,
    pub cors_origins: Vec<Origin>,
    pub implicit_load: ImplicitLoad,
}

impl AccessOptions {
    /// Reads the keys, and warns where a server that listens on `local` would be open to others.
    pub fn open(self, local: SocketAddr) -> Result<Opened, CliError> {
        let cors_origins = self.cors_origin.unwrap_or_default();
        let cors_origins =
            cors_origins.iter().map(|origin| origin.parse()).collect::<Result<_, _>>();
        let cors_origins =
            cors_origins.map_err(|e| CliError::Usage(format!("--cors-origin: {e}")))?;
        let implicit_load = self.implicit_load.as_deref().unwrap_or("any").parse();
        let implicit_load =
            implicit_load.map_err(|e| CliError::Usage(format!("--implicit-load: {e}")))?;
        let sources = KeySources {
            user_file: self.api_key_file,
            admin_file: self.admin_key_file,
            // Not options: everybody on a machine can read the command lines of all programs.
            user_keys: variable("CARTOUCHE_API_KEY")?,
            admin_keys: variable("CARTOUCHE_ADMIN_KEY")?,
        };
        let loopback = local.ip().is_loopback();
        let access = Access::new(sources, loopback)?;
        if !access.has_keys() && !loopback {
            tracing::warn!(
                "ANYBODY who can reach {local} can use this server: no API keys are set. Set \
                 CARTOUCHE_API_KEY or --api-key-file, or listen on 127.0.0.1 (--host)"
            );
        }
        if access.has_keys() && !loopback {
            tracing::info!("keys travel in clear text: put a proxy that speaks TLS before {local}");
        }
        Ok(Opened { access: Arc::new(access), cors_origins, implicit_load })
    }
}

fn variable(name: &str) -> Result<Option<String>, CliError> {
    match std::env::var(name) {
        Ok(value) => Ok(Some(value)),
        Err(std::env::VarError::NotPresent) => Ok(None),
        Err(_) => Err(CliError::Usage(format!("{name} is not UTF-8"))),
    }
}

/// Resolves when SIGHUP asks to read the keys again.
pub async fn hangup() {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        if let Ok(mut hangups) = signal(SignalKind::hangup()) {
            hangups.recv().await;
            return;
        }
    }
    std::future::pending().await
}
