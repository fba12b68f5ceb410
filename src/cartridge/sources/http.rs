//! Cartridges at any address of a host that the operator listed. Off unless one is.

use std::time::Instant;

use super::{
    cached::{Fetch, Remote},
    choose::base,
    transfer::{Address, Expected, Failure, Hosts, Request, Told, Transfer, parse_sha256},
};
use crate::cartridge::{CartridgeError, Source};

/// Addresses `https://host/path/file.pt[#sha256=…]`. Hosts are listed by name and compared by name, redirects
/// too: an address that is written to mean another machine is not one of them.
#[derive(Debug, Clone)]
pub struct HttpFiles {
    hosts: Hosts,
    offline: bool,
}

impl HttpFiles {
    /// # Errors
    /// A sentence about the first host that is none.
    pub fn new(hosts: &[String], offline: bool) -> Result<Self, String> {
        let hosts = Hosts::new(hosts.iter().map(String::as_str))?;
        Ok(Self { hosts, offline })
    }
}

impl Fetch for HttpFiles {
    fn source(&self) -> Source {
        Source::Http
    }

    fn locate(&self, id: &str, _: &Transfer, _: Instant) -> Result<Remote, CartridgeError> {
        let invalid = |reason: &str| CartridgeError::InvalidId {
            // What is wrong may be a key in it.
            id: id.split(['?', '#', '@']).next().unwrap_or_default().to_owned(),
            reason: format!(
                "{reason}; an id of `source` = `http` is https://host/path[#sha256=...]"
            ),
        };
        let unavailable = |reason: &str| CartridgeError::SourceUnavailable {
            id: id.to_owned(),
            from: Source::Http,
            reason: reason.to_owned(),
        };
        let (address, sha256) = match id.split_once("#sha256=") {
            Some((address, digest)) => {
                let digest = parse_sha256(digest).ok_or_else(|| invalid("its SHA-256 is none"))?;
                (address, Some(digest))
            }
            None if id.contains('#') => return Err(invalid("its part after # is not known")),
            None => (id, None),
        };
        let address = Address::parse(address).map_err(invalid)?;
        if self.hosts.is_empty() {
            return Err(unavailable(
                "this server takes no cartridges from addresses (--http-source-host lists hosts)",
            ));
        }
        if !self.hosts.allow(&address) {
            return Err(unavailable("its host is not listed with --http-source-host"));
        }
        if self.offline {
            return Err(unavailable(
                "the network is not used (--offline), only what the cartridge cache holds",
            ));
        }
        Ok(Remote {
            file: base(address.path()).to_owned(),
            request: Request { hosts: self.hosts.clone(), ..Request::new(address) },
            expected: Expected { sha256, ..Expected::default() },
            revision: None,
            etag: None,
            config: None,
        })
    }

    fn told(&self, id: &str, failure: Failure) -> CartridgeError {
        let access = "its host wants credentials, which this source does not send";
        failure.told(Told { id, source: Source::Http, stem: "Could not download it", access })
    }
}
