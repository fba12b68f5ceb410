//! Keys as operators write them down: a line each, or a YAML (or JSON) list that says what each may do.
//!
//! No error repeats anything of a file but names: what stands in the wrong place may be a key.

use std::{
    fs::File,
    io::Read,
    path::{Path, PathBuf},
    time::SystemTime,
};

use serde::Deserialize;

use super::{Rights, Role, Scope, ring};
use crate::{cartridge::digest_from_hex, limits};
use ring::Key;

/// What is wrong with the keys. Shows paths and names, never a key.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum KeyError {
    #[error("{path}: cannot be read: {reason}", path = path.display())]
    Io { path: PathBuf, reason: String },
    #[error("{path}: {reason}", path = path.display())]
    File { path: PathBuf, reason: String },
    #[error("{variable}: {reason}")]
    Variable { variable: &'static str, reason: String },
    #[error("two API keys are named `{name}`")]
    SameName { name: String },
    #[error("the API key `{name}` was given before, under another name or in another place")]
    SameKey { name: String },
    #[error("there are more than {limit} API keys")]
    TooMany { limit: usize },
}

/// A file of keys.
pub(super) struct KeyFile {
    pub path: PathBuf,
    /// Of its keys, unless they say otherwise.
    pub role: Role,
}

/// Changes when the file does.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct FileStamp {
    modified: Option<SystemTime>,
    len: u64,
    inode: u64,
}

const FORM: &str = "expected a list of entries with `name`, `key` or `sha256`, and optionally `role` \
                    (user or admin), `cartridges` (a list), `cache_salt`, `force_redownload`";

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    name: String,
    key: Option<String>,
    sha256: Option<String>,
    role: Option<Role>,
    cartridges: Option<Vec<String>>,
    cache_salt: Option<String>,
    force_redownload: Option<bool>,
}

impl KeyFile {
    /// The present state; `None` where there is no file.
    pub fn stamp(&self) -> Option<FileStamp> {
        let metadata = std::fs::metadata(&self.path).ok()?;
        #[cfg(unix)]
        let inode = std::os::unix::fs::MetadataExt::ino(&metadata);
        #[cfg(not(unix))]
        let inode = 0;
        Some(FileStamp { modified: metadata.modified().ok(), len: metadata.len(), inode })
    }

    /// Its keys: at least one.
    pub fn read(&self) -> Result<Vec<Key>, KeyError> {
        let path = self.path.clone();
        let text =
            read(&path).map_err(|e| KeyError::Io { path: path.clone(), reason: e.to_string() })?;
        let wrong = |reason| KeyError::File { path: path.clone(), reason };
        let text = text.ok_or_else(|| {
            wrong(format!("is not text of at most {} bytes", limits::MAX_KEY_FILE_BYTES))
        })?;
        let is_list =
            matches!(path.extension().and_then(|e| e.to_str()), Some("yaml" | "yml" | "json"));
        let keys = if is_list { self.entries(&text) } else { self.lines(&text) }.map_err(wrong)?;
        if keys.is_empty() {
            // Without keys the server would be open to everybody.
            return Err(wrong("holds no key".to_owned()));
        }
        Ok(keys)
    }

    fn lines(&self, text: &str) -> Result<Vec<Key>, String> {
        let lines = (1..).zip(text.lines().map(str::trim));
        let keys = lines.filter(|(_, line)| !line.is_empty() && !line.starts_with('#'));
        let role = self.role;
        let label = if role == Role::Admin { "admin" } else { "key" };
        keys.map(|(number, key)| {
            check(key).map_err(|reason| {
                format!("line {number}: {reason} (a list of entries is a .yaml or .json file)")
            })?;
            let rights = Rights::of(format!("{label}-line-{number}"), role);
            Ok(Key::new(ring::digest(key.as_bytes()), rights))
        })
        .collect()
    }

    fn entries(&self, text: &str) -> Result<Vec<Key>, String> {
        let entries: Vec<Entry> = serde_yaml_ng::from_str(text).map_err(|error| {
            // Its own message would repeat what it found.
            let place = error.location();
            let place = place.map(|at| format!("line {}, column {}: ", at.line(), at.column()));
            format!("{}{FORM}", place.unwrap_or_default())
        })?;
        let named = (1..).zip(entries);
        named.map(|(i, entry)| entry.key(i, self.role)).collect()
    }
}

impl Entry {
    fn key(self, number: usize, default: Role) -> Result<Key, String> {
        if self.name.trim().is_empty() || self.name.len() > limits::MAX_KEY_NAME_BYTES {
            let limit = limits::MAX_KEY_NAME_BYTES;
            return Err(format!("entry {number}: `name` has 1 to {limit} bytes"));
        }
        let name = self.name;
        let wrong = |reason: String| format!("key `{name}`: {reason}");
        let digest = match (&self.key, &self.sha256) {
            (Some(key), None) => {
                check(key).map_err(|reason| wrong(reason.to_owned()))?;
                ring::digest(key.as_bytes())
            }
            (None, Some(hex)) => digest_from_hex(hex)
                .ok_or_else(|| wrong("`sha256` is not 64 hexadecimal digits".to_owned()))?,
            _ => return Err(wrong("give either `key` or `sha256`".to_owned())),
        };
        let role = self.role.unwrap_or(default);
        if default == Role::Admin && role != Role::Admin {
            return Err(wrong("the file of admin keys holds admin keys only".to_owned()));
        }
        let scope = match &self.cartridges {
            None => Scope::default(),
            Some(_) if role == Role::Admin => {
                return Err(wrong(
                    "an admin key has no `cartridges`: it may change all".to_owned(),
                ));
            }
            Some(list) => Scope::new(list).map_err(|e| wrong(format!("`cartridges`: {e}")))?,
        };
        if self
            .cache_salt
            .as_ref()
            .is_some_and(|salt| salt.is_empty() || salt.len() > limits::MAX_CACHE_SALT_BYTES)
        {
            let limit = limits::MAX_CACHE_SALT_BYTES;
            return Err(wrong(format!("`cache_salt` has 1 to {limit} bytes")));
        }
        let rights = Rights {
            scope,
            cache_salt: self.cache_salt,
            force_redownload: self.force_redownload.unwrap_or(true),
            ..Rights::of(name.clone(), role)
        };
        Ok(Key::new(digest, rights))
    }
}

/// The keys of an environment variable.
pub(super) fn comma_separated(
    variable: &'static str,
    list: &str,
    role: Role,
) -> Result<Vec<Key>, KeyError> {
    let keys = (1..).zip(list.split(',').map(str::trim));
    keys.map(|(number, key)| {
        check(key).map_err(|reason| {
            // Set and empty is a mistake that must not open the server.
            let reason = format!("part {number}: {reason}; unset it to have none");
            KeyError::Variable { variable, reason }
        })?;
        let rights = Rights::of(format!("{variable}-{number}"), role);
        Ok(Key::new(ring::digest(key.as_bytes()), rights))
    })
    .collect()
}

/// Whether this can be a key: what can stand in a header, and no more than a client may send.
fn check(key: &str) -> Result<(), &'static str> {
    match key.len() {
        0 => Err("an empty key"),
        1..limits::MIN_API_KEY_BYTES => Err("a key of less than 8 characters can be guessed"),
        length if length > limits::MAX_API_KEY_BYTES => Err("a key of more than 512 characters"),
        _ if !key.bytes().all(|byte| byte.is_ascii_graphic()) => {
            Err("a key is visible ASCII without white space")
        }
        _ => Ok(()),
    }
}

/// The whole text; `None` if it is too long or not UTF-8.
fn read(path: &Path) -> std::io::Result<Option<String>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(limits::MAX_KEY_FILE_BYTES + 1).read_to_end(&mut bytes)?;
    let fits = bytes.len() as u64 <= limits::MAX_KEY_FILE_BYTES;
    Ok(if fits { String::from_utf8(bytes).ok() } else { None })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{api::access::ring::KeyRing, cartridge::Source};

    fn read_as(name: &str, text: &str, role: Role) -> Result<KeyRing, KeyError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        KeyRing::new(KeyFile { path, role }.read()?)
    }

    #[test]
    fn a_line_is_a_key() {
        let text = "# ours\nsecret-one\n\n  secret-two \r\n";
        let ring = read_as("keys", text, Role::User).unwrap();
        let name = |key: &str| ring.find(key.as_bytes()).map(|c| (c.name.clone(), c.role));
        assert_eq!(name("secret-one"), Some(("key-line-2".to_owned(), Role::User)));
        assert_eq!(name("secret-two"), Some(("key-line-4".to_owned(), Role::User)));
        assert_eq!((name("# ours"), name("")), (None, None));
        let ring = read_as("keys", "secret-one", Role::Admin).unwrap();
        assert!(ring.has_admin());
    }

    #[test]
    fn entries_say_what_a_key_may_do() {
        let hex: String =
            ring::digest(b"secret-two").iter().map(|byte| format!("{byte:02X}")).collect();
        let text = format!(
            "- name: a\n  key: secret-one\n  cartridges: [notes, 'team/*']\n  cache_salt: s\n  \
             force_redownload: false\n- name: b\n  sha256: {hex}\n  role: admin\n"
        );
        let ring = read_as("keys.yaml", &text, Role::User).unwrap();
        let a = ring.find(b"secret-one").unwrap();
        assert!(a.scope.allows("team/x", Source::Local) && !a.scope.allows("other", Source::Local));
        assert_eq!((a.role, a.cache_salt.as_deref()), (Role::User, Some("s")));
        assert!(!a.force_redownload);
        let b = ring.find(b"secret-two").unwrap();
        assert!(b.role == Role::Admin && b.scope.is_all() && b.force_redownload);
        let json = r#"[{"name": "a", "key": "secret-one"}]"#;
        assert_eq!(read_as("keys.json", json, Role::User).unwrap().len(), 1);
    }

    #[test]
    fn the_file_in_the_documentation_is_one() {
        let docs = include_str!("../../../docs/access.md");
        let yaml = docs.split("```yaml\n").nth(1).unwrap().split("```").next().unwrap();
        let ring = read_as("keys.yaml", yaml, Role::User).unwrap();
        assert_eq!((ring.len(), ring.has_admin()), (2, true));
        assert_eq!(ring.find(b"test").unwrap().name, "team-a");
    }

    #[test]
    fn bad_files_are_refused_without_showing_a_key() {
        let long = "secret".repeat(100);
        for (name, text) in [
            ("keys", String::new()),
            ("keys", "# nothing\n".to_owned()),
            ("keys", "secret words".to_owned()),
            ("keys", "sécrétsecret".to_owned()),
            ("keys", "secret".to_owned()),
            ("keys", "- name: secret-one".to_owned()),
            ("keys", "secret-one\nsecret-one".to_owned()),
            ("keys", long),
            ("keys", "# \n".repeat(limits::MAX_KEY_FILE_BYTES as usize)),
            ("keys.yaml", "secret-one".to_owned()),
            ("keys.yaml", "- secret-one".to_owned()),
            ("keys.yaml", "secret-one: secret-two".to_owned()),
            ("keys.yaml", "[]".to_owned()),
            ("keys.yaml", "- {name: a}".to_owned()),
            ("keys.yaml", "- {name: a, key: 5}".to_owned()),
            ("keys.yaml", "- {name: a, key: secret-one, role: secret}".to_owned()),
            ("keys.yaml", "- {name: a, key: secret-one, kartridges: []}".to_owned()),
            ("keys.yaml", "- {name: a, key: secret-one, sha256: ab}".to_owned()),
            ("keys.yaml", "- {name: a, sha256: secret-one}".to_owned()),
            ("keys.yaml", "- {name: a, sha256: +secret}".to_owned()),
            ("keys.yaml", "- {name: '', key: secret-one}".to_owned()),
            ("keys.yaml", "- {name: a, key: secret-one, cache_salt: ''}".to_owned()),
            ("keys.yaml", "- {name: a, key: secret-one, cartridges: ['']}".to_owned()),
            ("keys.yaml", "- {name: a, key: secret-one, role: admin, cartridges: [b]}".to_owned()),
        ] {
            let error = read_as(name, &text, Role::User).err().unwrap_or_else(|| panic!("{text}"));
            let message = error.to_string();
            assert!(!message.contains("secret"), "{message}");
        }
        let user = "- {name: a, key: secret-one, role: user}";
        assert!(read_as("keys.yaml", user, Role::Admin).is_err());
    }

    #[test]
    fn variables_hold_several_keys_and_an_empty_one_is_an_error() {
        let keys = |list: &str| comma_separated("V", list, Role::User).map(|keys| keys.len());
        assert_eq!(keys("secret-one, secret-two").unwrap(), 2);
        for list in ["", " ", "secret-one,", ",secret-one", "short"] {
            let message = keys(list).unwrap_err().to_string();
            assert!(message.starts_with("V: ") && !message.contains("secret"), "{message}");
        }
    }
}
