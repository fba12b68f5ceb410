//! Compare and swap: what must be there for a change to be made, said in headers or in fields.

use axum::http::{
    HeaderMap, HeaderName, StatusCode,
    header::{IF_MATCH, IF_NONE_MATCH},
};

use super::about_id;
use crate::{
    api::error::ApiError,
    cartridge::{CartridgeError, Expect, Generation},
};

/// See the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Precondition {
    pub expect: Expect,
    /// A header that does not hold is a 412, a field a 409.
    in_header: bool,
}

impl Precondition {
    /// `If-Match: "generation"`, or `If-None-Match: *` for an id that must not be there.
    pub fn of_headers(headers: &HeaderMap) -> Result<Self, ApiError> {
        let expect = match (one(headers, IF_MATCH)?, one(headers, IF_NONE_MATCH)?) {
            (None, None) => Expect::Anything,
            (Some(tag), None) => {
                let quoted = tag.strip_prefix('"').and_then(|tag| tag.strip_suffix('"'));
                let generation = quoted.and_then(Generation::from_hex);
                Expect::Generation(generation.ok_or_else(|| {
                    ApiError::invalid(
                        "If-Match",
                        "If-Match must be one generation in double quotes",
                    )
                })?)
            }
            (None, Some("*")) => Expect::Nothing,
            (None, Some(_)) => {
                return Err(ApiError::invalid("If-None-Match", "If-None-Match must be *"));
            }
            (Some(_), Some(_)) => {
                let message = "If-Match and If-None-Match exclude each other";
                return Err(ApiError::invalid("If-Match", message));
            }
        };
        Ok(Self { expect, in_header: expect != Expect::Anything })
    }

    /// Completed by the fields `expected_generation` and `if_absent`.
    pub fn and_fields(
        self,
        generation: Option<&str>,
        if_absent: Option<&str>,
    ) -> Result<Self, ApiError> {
        let if_absent = match if_absent {
            None | Some("false") => false,
            Some("true") => true,
            Some(_) => {
                return Err(ApiError::invalid("if_absent", "if_absent must be true or false"));
            }
        };
        let expect = match (generation, if_absent) {
            (None, false) => return Ok(self),
            (None, true) => Expect::Nothing,
            (Some(hex), false) => {
                let generation = Generation::from_hex(hex);
                Expect::Generation(generation.ok_or_else(|| {
                    let message = "expected_generation must be 64 hexadecimal digits";
                    ApiError::invalid("expected_generation", message)
                })?)
            }
            (Some(_), true) => {
                let message = "expected_generation and if_absent exclude each other";
                return Err(ApiError::invalid("if_absent", message));
            }
        };
        if self.in_header {
            let message = "say what is expected in a header or in a field, not in both";
            return Err(ApiError::bad_request(message));
        }
        Ok(Self { expect, in_header: false })
    }

    /// The error of a change; one that found something else says which generation.
    pub fn failed(self, error: CartridgeError) -> ApiError {
        let found = match &error {
            CartridgeError::Conflict { found, .. } => {
                Some(found.strip_prefix("generation ").unwrap_or("none").into())
            }
            _ => None,
        };
        let error = about_id(error);
        match self.in_header && error.status == StatusCode::CONFLICT {
            true => ApiError { status: StatusCode::PRECONDITION_FAILED, found, ..error },
            false => ApiError { found, ..error },
        }
    }
}

fn one(headers: &HeaderMap, name: HeaderName) -> Result<Option<&str>, ApiError> {
    let mut all = headers.get_all(&name).iter();
    let wrong = |what| ApiError::invalid(name.as_str(), format!("{name} {what}"));
    match (all.next(), all.next()) {
        (None, _) => Ok(None),
        (Some(value), None) => value.to_str().map(Some).map_err(|_| wrong("is not ASCII")),
        (Some(_), Some(_)) => Err(wrong("was sent more than once")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(list: &[(HeaderName, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in list {
            headers.append(name, value.parse().unwrap());
        }
        headers
    }

    #[test]
    fn headers_and_fields_say_the_same() {
        let hex = "ab".repeat(32);
        let generation = Expect::Generation(Generation::from_hex(&hex).unwrap());
        let of = |list: &[(HeaderName, &str)]| Precondition::of_headers(&headers(list));
        assert_eq!(of(&[]).unwrap().expect, Expect::Anything);
        assert_eq!(of(&[(IF_MATCH, &format!("\"{hex}\""))]).unwrap().expect, generation);
        assert_eq!(of(&[(IF_NONE_MATCH, "*")]).unwrap().expect, Expect::Nothing);
        let none = of(&[]).unwrap();
        assert_eq!(none.and_fields(Some(&hex), None).unwrap().expect, generation);
        assert_eq!(none.and_fields(None, Some("true")).unwrap().expect, Expect::Nothing);
        assert_eq!(none.and_fields(None, Some("false")).unwrap(), none);
    }

    #[test]
    fn what_says_two_things_or_none_is_refused() {
        let hex = "ab".repeat(32);
        let quoted = format!("\"{hex}\"");
        for list in [
            vec![(IF_MATCH, hex.as_str())],
            vec![(IF_MATCH, "*")],
            vec![(IF_MATCH, "\"ab\"")],
            vec![(IF_MATCH, "W/\"ab\"")],
            vec![(IF_MATCH, ""), (IF_MATCH, &quoted)],
            vec![(IF_NONE_MATCH, &quoted)],
            vec![(IF_MATCH, &quoted), (IF_NONE_MATCH, "*")],
        ] {
            assert!(Precondition::of_headers(&headers(&list)).is_err(), "{list:?}");
        }
        let none = Precondition::of_headers(&headers(&[])).unwrap();
        assert!(none.and_fields(Some("ab"), None).is_err());
        assert!(none.and_fields(Some(&hex), Some("true")).is_err());
        assert!(none.and_fields(None, Some("yes")).is_err());
        let header = Precondition::of_headers(&headers(&[(IF_NONE_MATCH, "*")])).unwrap();
        assert!(header.and_fields(None, Some("true")).is_err());
    }
}
