//! Leases for a request: what its caller may name, and what may be fetched or read for it.

use std::{fmt, str::FromStr};

use super::{AppState, access::Caller, error::ApiError};
use crate::cartridge::{CartridgeError, CartridgeRef, Lease, Source};

/// What a request that names a cartridge may set going.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ImplicitLoad {
    /// Nothing: it gets what is in memory, which admins load.
    Off,
    /// A file of the cartridge directory is read. What remote sources have is used once an admin loaded it.
    Local,
    /// Also a fetch from the remote source it names, as in Tokasaurus.
    #[default]
    Any,
}

impl FromStr for ImplicitLoad {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "off" => Ok(Self::Off),
            "local" => Ok(Self::Local),
            "any" => Ok(Self::Any),
            _ => Err(format!("`{text}` is none of off, local, any")),
        }
    }
}

impl fmt::Display for ImplicitLoad {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Off => "off",
            Self::Local => "local",
            Self::Any => "any",
        })
    }
}

/// Leases on all of them. Loading runs elsewhere; this only waits.
///
/// A cartridge of others is told like one that does not exist, and nothing is looked up to tell it: neither
/// words nor time say whether there is one.
pub async fn acquire(
    state: &AppState,
    caller: &Caller,
    references: &[CartridgeRef],
) -> Result<Vec<Lease>, ApiError> {
    let mode = state.options.implicit_load;
    for reference in references {
        check(mode, caller, reference)?;
    }
    let mut leases = Vec::with_capacity(references.len());
    for reference in references {
        let lease = lend(state, mode, reference).await?;
        // Two sources can lead to one cartridge; attended to twice it would weigh twice.
        let same = |l: &Lease| l.id() == lease.id() && l.generation() == lease.generation();
        if !leases.iter().any(same) {
            leases.push(lease);
        }
    }
    Ok(leases)
}

fn check(mode: ImplicitLoad, caller: &Caller, reference: &CartridgeRef) -> Result<(), ApiError> {
    let CartridgeRef { id, source, force_redownload } = reference;
    if !caller.scope.allows(id, *source) {
        return Err(absent(mode, id, *source).into());
    }
    let refused = match mode {
        _ if !*force_redownload => return Ok(()),
        _ if !caller.force_redownload => "this API key may not ask for force_redownload".to_owned(),
        ImplicitLoad::Any => return Ok(()),
        ImplicitLoad::Local if *source == Source::Local => return Ok(()),
        _ => format!("force_redownload is for admins here (--implicit-load {mode})"),
    };
    let error = ApiError::forbidden("force_redownload_forbidden", refused);
    Err(ApiError { param: Some("cartridges".to_owned()), ..error })
}

async fn lend(
    state: &AppState,
    mode: ImplicitLoad,
    reference: &CartridgeRef,
) -> Result<Lease, CartridgeError> {
    let resident = || {
        let lease = state.registry.resident(reference);
        lease.ok_or_else(|| absent(mode, &reference.id, reference.source))
    };
    match mode {
        ImplicitLoad::Off => resident(),
        ImplicitLoad::Local if reference.source != Source::Local => {
            let local = CartridgeRef { source: Source::Local, ..reference.clone() };
            match state.registry.acquire(&local).await {
                Err(CartridgeError::NotFound { .. }) => resident(),
                other => other,
            }
        }
        _ => state.registry.acquire(reference).await,
    }
}

/// What is said where there is no such cartridge.
fn absent(mode: ImplicitLoad, id: &str, source: Source) -> CartridgeError {
    let hint = match mode {
        ImplicitLoad::Off => "it is not in memory, and requests load nothing here",
        ImplicitLoad::Local if source != Source::Local => {
            "it is neither in the cartridge directory nor in memory, and requests fetch nothing here"
        }
        _ => return CartridgeError::not_found(id),
    };
    CartridgeError::NotFound { id: id.to_owned(), hint: format!("{hint} (--implicit-load {mode})") }
}
