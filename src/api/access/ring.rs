//! The keys that are valid now.

use std::{collections::HashSet, sync::Arc};

use sha2::{Digest, Sha256};
use subtle::{ConditionallySelectable, ConstantTimeEq};

use super::{Caller, KeyError, Rights, Role};
use crate::limits;

/// One key: its digest and what it opens.
#[derive(Clone)]
pub(super) struct Key {
    digest: [u8; 32],
    caller: Caller,
}

impl Key {
    pub fn new(digest: [u8; 32], rights: Rights) -> Self {
        Self { digest, caller: Caller(Arc::new(rights)) }
    }
}

/// Where in a client's request a key stands, it is taken as the bytes it is: no trimming, no other case.
pub(super) fn digest(key: &[u8]) -> [u8; 32] {
    Sha256::digest(key).into()
}

/// All of them. Without any, nobody needs one.
#[derive(Default)]
pub(super) struct KeyRing {
    keys: Vec<Key>,
}

impl KeyRing {
    pub fn new(keys: Vec<Key>) -> Result<Self, KeyError> {
        if keys.len() > limits::MAX_API_KEYS {
            return Err(KeyError::TooMany { limit: limits::MAX_API_KEYS });
        }
        let (mut names, mut digests) = (HashSet::new(), HashSet::new());
        for Key { digest, caller } in &keys {
            if !names.insert(&caller.name) {
                return Err(KeyError::SameName { name: caller.name.clone() });
            }
            if !digests.insert(digest) {
                return Err(KeyError::SameKey { name: caller.name.clone() });
            }
        }
        Ok(Self { keys })
    }

    pub fn len(&self) -> usize {
        self.keys.len()
    }

    pub fn has_admin(&self) -> bool {
        self.keys.iter().any(|key| key.caller.role == Role::Admin)
    }

    /// Whose key this is. The time it takes tells neither which key was nearest nor where a match stands:
    /// digests are compared, whole, with every key's.
    pub fn find(&self, presented: &[u8]) -> Option<Caller> {
        let presented = digest(presented);
        let mut found = 0u64;
        for (place, key) in (1u64..).zip(&self.keys) {
            found.conditional_assign(&place, key.digest.ct_eq(&presented));
        }
        let place = usize::try_from(found).ok()?.checked_sub(1)?;
        self.keys.get(place).map(|key| key.caller.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str, secret: &str) -> Key {
        Key::new(digest(secret.as_bytes()), Rights::of(name, Role::User))
    }

    #[test]
    fn a_key_is_found_wherever_it_stands_and_as_it_is_written() {
        let names = ["a", "b", "c"];
        let ring = KeyRing::new(names.map(|name| key(name, &format!("Key-{name}"))).into());
        let ring = ring.unwrap();
        let found = |secret: &str| ring.find(secret.as_bytes()).map(|caller| caller.name.clone());
        for name in names {
            assert_eq!(found(&format!("Key-{name}")).as_deref(), Some(name));
        }
        for wrong in ["", "key-a", "KEY-A", "Key-a ", " Key-a", "Key-", "Key-aa"] {
            assert_eq!(found(wrong), None, "{wrong:?}");
        }
        assert!(KeyRing::default().find(b"").is_none());
    }

    #[test]
    fn a_key_or_a_name_given_twice_is_an_error_that_shows_no_key() {
        let same_key = KeyRing::new(vec![key("a", "secret"), key("b", "secret")]).err().unwrap();
        let same_name = KeyRing::new(vec![key("a", "secret"), key("a", "other")]).err().unwrap();
        for (error, name) in [(same_key, "`b`"), (same_name, "`a`")] {
            let message = error.to_string();
            assert!(message.contains(name) && !message.contains("secret"), "{message}");
        }
    }
}
