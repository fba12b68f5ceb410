//! Addresses, and which of them a transfer may be sent on to.

use std::fmt;

use ureq::http::Uri;

/// A text that gives access. It is sent, and never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// The value of an `Authorization` header.
    ///
    /// # Errors
    /// A sentence, if the text cannot be sent (a line break from a file, a copied quotation mark).
    pub fn new(text: String) -> Result<Self, &'static str> {
        match text.bytes().all(|b| (b' '..=b'~').contains(&b)) {
            true => Ok(Self(text)),
            false => Err("it has characters that no key has"),
        }
    }

    pub(in crate::cartridge::sources) fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

/// An `http` or `https` address with a host and without credentials.
#[derive(Clone, PartialEq, Eq)]
pub struct Address(Uri);

/// What of it decides who is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    https: bool,
    /// In lower case.
    host: String,
    port: u16,
}

impl Address {
    /// # Errors
    /// A sentence that does not repeat the text, which may hold a key.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        let uri: Uri = text.parse().map_err(|_| "it is no address")?;
        let authority = uri.authority().ok_or("it has no host")?;
        match uri.scheme_str() {
            Some("http" | "https") => {}
            _ => return Err("it does not begin with https://"),
        }
        if authority.as_str().contains('@') {
            return Err("it holds credentials; give them in the environment");
        }
        if authority.host().is_empty() {
            return Err("it has no host");
        }
        Ok(Self(uri))
    }

    /// Where a `Location` header leads from here.
    pub(super) fn join(&self, location: &str) -> Result<Self, &'static str> {
        let Origin { https, .. } = self.origin();
        let scheme = if https { "https" } else { "http" };
        match location {
            absolute if absolute.contains("://") && !absolute.starts_with('/') => {
                Self::parse(absolute)
            }
            other if other.starts_with("//") => Self::parse(&format!("{scheme}:{other}")),
            path if path.starts_with('/') => {
                let authority = self.0.authority().map_or("", |authority| authority.as_str());
                Self::parse(&format!("{scheme}://{authority}{path}"))
            }
            _ => Err("it leads to an address that is neither whole nor a path"),
        }
    }

    pub fn origin(&self) -> Origin {
        let https = self.0.scheme_str() == Some("https");
        Origin {
            https,
            host: self.0.host().unwrap_or_default().to_ascii_lowercase(),
            port: self.0.port_u16().unwrap_or(if https { 443 } else { 80 }),
        }
    }

    pub fn is_https(&self) -> bool {
        self.origin().https
    }

    /// The whole of it, for the request.
    pub(super) fn reveal(&self) -> &Uri {
        &self.0
    }

    pub fn path(&self) -> &str {
        self.0.path()
    }

    /// The name of the host, for messages.
    pub fn host(&self) -> &str {
        self.0.host().unwrap_or_default()
    }
}

/// Without the query, in which storages put their signatures.
impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let authority = self.0.authority().map_or("", |authority| authority.as_str());
        write!(f, "{}://{authority}{}", self.0.scheme_str().unwrap_or_default(), self.0.path())
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Hosts that may be asked besides the one that was named. Names are compared as they are: no name is looked
/// up, so none can be made to mean something else.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Hosts(Vec<Pattern>);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Pattern {
    Exact(Origin),
    /// Any host below, by https on its usual port.
    Below(String),
}

impl Hosts {
    /// `host`, `host:port` (both https), `http://host:port` (plain, said out loud), or `*.domain`.
    ///
    /// # Errors
    /// A sentence about the first that is none of these.
    pub fn new<'a>(patterns: impl IntoIterator<Item = &'a str>) -> Result<Self, String> {
        let parse = |text: &str| {
            if let Some(domain) = text.strip_prefix("*.") {
                let domain = domain.to_ascii_lowercase();
                let is_domain = domain.contains('.')
                    && domain.bytes().all(|b| b.is_ascii_alphanumeric() || b"-.".contains(&b));
                return is_domain.then_some(Pattern::Below(domain)).ok_or("it is no domain");
            }
            let whole = match text.contains("://") {
                true => text.to_owned(),
                false => format!("https://{text}"),
            };
            let address = Address::parse(&whole)?;
            match address.path() {
                "" | "/" => Ok(Pattern::Exact(address.origin())),
                _ => Err("it has a path; name the host alone"),
            }
        };
        let parsed = patterns.into_iter().map(|text| {
            let text = text.trim();
            parse(text).map_err(|reason| format!("host `{text}`: {reason}"))
        });
        Ok(Self(parsed.collect::<Result<_, _>>()?))
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn allow(&self, address: &Address) -> bool {
        let origin = address.origin();
        self.0.iter().any(|pattern| match pattern {
            Pattern::Exact(listed) => *listed == origin,
            Pattern::Below(domain) => {
                let name = origin.host.strip_suffix(domain.as_str());
                let is_below = name.is_some_and(|name| name.len() > 1 && name.ends_with('.'));
                is_below && origin.https && origin.port == 443
            }
        })
    }
}

/// Text as part of a path or a query.
pub fn encode(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => {
                encoded.push(char::from(byte));
            }
            _ => encoded.push_str(&format!("%{byte:02X}")),
        }
    }
    encoded
}

/// A path of several parts.
pub fn encode_path(path: &str) -> String {
    path.split('/').map(encode).collect::<Vec<_>>().join("/")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_listed_hosts_are_allowed_however_an_address_is_written() {
        let hosts =
            Hosts::new(["example.com", "mirror.example:8443", "http://127.0.0.1:80", "*.hf.co"])
                .unwrap();
        for allowed in [
            "https://example.com/a",
            "https://EXAMPLE.com:443/a",
            "https://mirror.example:8443/",
            "http://127.0.0.1/x",
            "https://cdn-lfs.hf.co/x?y",
            "https://cas-bridge.xethub.hf.co/x",
        ] {
            assert!(hosts.allow(&Address::parse(allowed).unwrap()), "{allowed}");
        }
        for refused in [
            "http://example.com/a",
            "https://example.com:444/a",
            "https://example.com.evil.net/",
            "https://evilexample.com/",
            "https://sub.example.com/",
            "https://mirror.example/",
            "https://127.0.0.1/",
            "http://127.0.0.2/",
            "http://2130706433/",
            "http://[::ffff:127.0.0.1]/",
            "https://hf.co/",
            "https://.hf.co/",
            "https://evilhf.co/",
            "http://cdn.hf.co/",
            "https://cdn.hf.co:8080/",
            "https://169.254.169.254/latest/meta-data",
        ] {
            let allowed = Address::parse(refused).is_ok_and(|address| hosts.allow(&address));
            assert!(!allowed, "{refused}");
        }
        for wrong in ["", "https://", "ftp://a.b", "a.b/path", "user@a.b", "*.", "*.com", "a b"] {
            assert!(Hosts::new([wrong]).is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_is_shown_has_no_query_and_no_credentials() {
        let address = Address::parse("https://s3.example/a/b?X-Amz-Signature=secret").unwrap();
        assert_eq!(format!("{address} {address:?}").matches("secret").count(), 0);
        assert!(Address::parse("https://user:secret@host/").is_err());
        assert_eq!(format!("{:?}", Secret::new("Bearer hf_x".to_owned())), "Ok((secret))");
        assert!(Secret::new("Bearer hf_x\nHost: evil".to_owned()).is_err());
    }

    #[test]
    fn redirects_are_resolved_against_the_address_they_come_from() {
        let from = Address::parse("https://a.example:8443/x/y?q").unwrap();
        for (location, to) in [
            ("/z", "https://a.example:8443/z"),
            ("//b.example/z", "https://b.example/z"),
            ("http://c.example/", "http://c.example/"),
            ("/z?to=https://d.example", "https://a.example:8443/z"),
        ] {
            assert_eq!(from.join(location).unwrap().to_string(), to);
        }
        for wrong in ["z", "", "ftp://a.example/", "https://user@b.example/"] {
            assert!(from.join(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn parts_of_a_path_cannot_add_parts() {
        assert_eq!(encode("refs/pr/1"), "refs%2Fpr%2F1");
        assert_eq!(encode_path("a b/ü?.pt"), "a%20b/%C3%BC%3F.pt");
    }
}
