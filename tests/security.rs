//! SECURITY.md promises nothing without a test: every name in it is one that exists.

use std::{collections::HashSet, fs, path::Path};

fn functions(folder: &Path, found: &mut HashSet<String>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            functions(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).unwrap();
            let names = text.lines().filter_map(|line| line.trim_start().split_once("fn "));
            let name = |after: &str| after.split(['(', '<']).next().unwrap_or_default().to_owned();
            found.extend(names.map(|(_, after)| name(after)));
        }
    }
}

#[test]
fn every_promise_names_a_test() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut known = HashSet::new();
    for folder in ["src", "tests", "fuzz"] {
        functions(&root.join(folder), &mut known);
    }
    // The targets of the fuzzing stand there too: each is a test of that name.
    let text = fs::read_to_string(root.join("SECURITY.md")).unwrap();
    let mut named = 0;
    for (number, line) in text.lines().enumerate().filter(|(_, line)| line.starts_with("| ")) {
        let Some((_, tests)) = line.trim_end_matches([' ', '|']).rsplit_once(" | ") else {
            continue;
        };
        for name in tests.split('`').skip(1).step_by(2) {
            let is_name =
                name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
            if is_name && name.len() > 2 {
                assert!(known.contains(name), "line {}: there is no test `{name}`", number + 1);
                named += 1;
            }
        }
    }
    assert!(named > 80, "only {named} names found: the tables changed their form");
}
