//! From a cartridge id to the name of its folder, by the rule of Tokasaurus, so that folders filled
//! by either server are found by the other.

use super::CartridgeError;
use crate::limits;

/// Longest name of a folder on common file systems.
const MAX_FOLDER_BYTES: usize = 255;

/// The folder of an id, below the cartridge directory. The rule is lossy (`a/b` and `a-b` share a
/// folder); it never gives a name with a separator or a dot, so no id can leave the directory.
///
/// # Errors
/// [`CartridgeError::InvalidId`] for an id that is empty, too long, or has no character that
/// survives (for those Tokasaurus takes a number that differs from process to process).
pub fn folder_name(id: &str) -> Result<String, CartridgeError> {
    let refused = |reason: String| {
        let id = id.chars().take(80).collect();
        Err(CartridgeError::InvalidId { id, reason })
    };
    if id.len() > limits::MAX_CARTRIDGE_ID_BYTES {
        let limit = limits::MAX_CARTRIDGE_ID_BYTES;
        return refused(format!("it has {} bytes, the limit is {limit}", id.len()));
    }
    if id.trim().is_empty() {
        return refused("it is empty".to_owned());
    }
    let replaced: String = id
        .chars()
        .map(|c| match c {
            '/' | '\\' => '-',
            ':' | '|' | '*' | '?' | '<' | '>' | '"' | '\'' | '\0'..='\x1f' | '\x7f' => '_',
            other => other,
        })
        .collect();
    let dotless = replace_runs(&replaced, |c| c == '.', 1);
    let name = replace_runs(dotless.trim(), |c| c == '_' || c == '-', 2);
    if name.is_empty() || name == "_" {
        return refused("it has no character that can name a folder".to_owned());
    }
    if name.len() > MAX_FOLDER_BYTES {
        let len = name.len();
        return refused(format!(
            "its folder name has {len} bytes, the limit is {MAX_FOLDER_BYTES}"
        ));
    }
    Ok(name)
}

/// Replaces each run of at least `least` matching characters by one underscore.
fn replace_runs(text: &str, matches: impl Fn(char) -> bool, least: usize) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let end = rest.find(|c| !matches(c)).unwrap_or(rest.len());
        // Each matched character is one byte long: a dot, an underscore or a hyphen.
        let taken = match end {
            0 => {
                out.push(c);
                c.len_utf8()
            }
            run if run >= least => {
                out.push('_');
                run
            }
            run => {
                out.push_str(&rest[..run]);
                run
            }
        };
        rest = &rest[taken..];
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn follows_tokasaurus() {
        for (id, folder) in [
            ("hazyresearch/cartridge-wauoq23f", "hazyresearch-cartridge-wauoq23f"),
            ("meta-llama/Llama-3.2-3B", "meta-llama-Llama-3_2-3B"),
            ("a--b", "a_b"),
            ("a_-b", "a_b"),
            ("../../etc/passwd", "_etc-passwd"),
            ("/data/run/cache-step32.pt", "-data-run-cache-step32_pt"),
            ("a b", "a b"),
            ("  a  ", "a"),
            ("a:b|c*d?e<f>g\"h'i", "a_b_c_d_e_f_g_h_i"),
            ("tab\there\x7f", "tab_here_"),
            ("..", "refused"),
            ("a...b", "a_b"),
            ("a\\b", "a-b"),
            ("/", "-"),
            ("ключ.é", "ключ_é"),
        ] {
            match folder_name(id) {
                Ok(name) => assert_eq!(name, folder, "{id:?}"),
                Err(_) => assert_eq!(folder, "refused", "{id:?}"),
            }
        }
    }

    #[test]
    fn hashed_and_oversized_ids_are_refused() {
        let long = "x".repeat(limits::MAX_CARTRIDGE_ID_BYTES + 1);
        let long_folder = "x".repeat(MAX_FOLDER_BYTES + 1);
        for id in ["", "  ", ".", "///", "::", " . ", "_", &long, &long_folder] {
            let error = folder_name(id).unwrap_err();
            assert!(matches!(error, CartridgeError::InvalidId { .. }), "{id:?}: {error}");
        }
        folder_name(&"x".repeat(MAX_FOLDER_BYTES)).unwrap();
    }

    #[test]
    fn no_name_can_leave_the_directory() {
        for id in ["../x", "a/../../b", "/etc/passwd", "..\\..\\x", "a\0b", "C:\\x"] {
            let name = folder_name(id).unwrap();
            assert!(!name.contains(['/', '\\', '.', '\0', ':']), "{id:?} gives {name:?}");
        }
    }
}
