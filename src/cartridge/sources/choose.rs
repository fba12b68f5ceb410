//! Which of a repository's or a run's files is the cartridge.

/// `cache-step512.pt` is 512.
pub(super) fn step(name: &str) -> Option<u64> {
    base(name).strip_prefix("cache-step")?.strip_suffix(".pt")?.parse().ok()
}

pub(super) fn base(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// Names that hold a model, not a cartridge, in most repositories.
fn is_model(name: &str) -> bool {
    let name = base(name);
    name.starts_with("model")
        || name.starts_with("adapter_model")
        || name.starts_with("pytorch_model")
}

fn is_cartridge(name: &str) -> bool {
    (name.ends_with(".pt") || name.ends_with(".safetensors")) && !is_model(name)
}

/// `cartridge.pt`, then `cartridge.safetensors`, then the `cache-step*.pt` with the highest number, then the
/// only `.pt` or `.safetensors`; files of the root first, then those of folders.
///
/// # Errors
/// A sentence, if several would do.
pub(super) fn choose<'a>(names: &[&'a str]) -> Result<Option<&'a str>, String> {
    let candidates = names.iter().copied().filter(|name| is_cartridge(name));
    let (root, below): (Vec<&str>, Vec<&str>) = candidates.partition(|name| !name.contains('/'));
    let files = if root.is_empty() { below } else { root };
    for wanted in ["cartridge.pt", "cartridge.safetensors"] {
        let named: Vec<&str> = files.iter().copied().filter(|f| base(f) == wanted).collect();
        if !named.is_empty() {
            return only(&named);
        }
    }
    if let Some(highest) = files.iter().filter_map(|name| step(name)).max() {
        let newest: Vec<&str> =
            files.iter().copied().filter(|name| step(name) == Some(highest)).collect();
        return only(&newest);
    }
    only(&files)
}

fn only<'a>(files: &[&'a str]) -> Result<Option<&'a str>, String> {
    match files {
        [] => Ok(None),
        [file] => Ok(Some(file)),
        [first, ..] => Err(format!(
            "{} files may be the cartridge; call one `cartridge.pt`, or name one in the id (.../{first})",
            files.len()
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_is_chosen_by_its_name() {
        for (names, chosen) in [
            (&["b.pt", "cartridge.pt", "cache-step9.pt"][..], "cartridge.pt"),
            (&["b.pt", "cartridge.safetensors", "cache-step9.pt"], "cartridge.safetensors"),
            (&["cache-step9.pt", "cache-step10.pt", "other.pt"], "cache-step10.pt"),
            (&["README.md", "only.pt", "config.yaml"], "only.pt"),
            (&["only.safetensors", "model.safetensors"], "only.safetensors"),
            (&["sub/cartridge.pt", "root.pt"], "root.pt"),
            (&["sub/cartridge.pt", "sub/other.pt"], "sub/cartridge.pt"),
            (&["a/cache-step1.pt", "a/cache-step2.pt"], "a/cache-step2.pt"),
        ] {
            assert_eq!(choose(names).unwrap(), Some(chosen), "{names:?}");
        }
        for none in [&["README.md"][..], &["model.safetensors"], &["pytorch_model.pt"], &[]] {
            assert_eq!(choose(none).unwrap(), None, "{none:?}");
        }
        for several in [
            &["a.pt", "b.pt"][..],
            &["a.pt", "b.safetensors"],
            &["x/cartridge.pt", "y/cartridge.pt"],
        ] {
            let error = choose(several).unwrap_err();
            assert!(error.starts_with("2 files") && error.contains(several[0]), "{error}");
        }
    }
}
