//! The YAML file behind the flags.

use std::path::Path;

use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Map, Value};

use super::CliError;

/// The values of a configuration file, keyed as the long flags with `_` for `-`.
#[derive(Debug, Default)]
pub struct ConfigFile {
    path: std::path::PathBuf,
    values: Map<String, Value>,
}

impl ConfigFile {
    /// Reads `path`; `None` is an empty file.
    pub fn read(path: Option<&Path>) -> Result<Self, CliError> {
        let Some(path) = path else { return Ok(Self::default()) };
        let text = std::fs::read_to_string(path)
            .map_err(|source| CliError::Io { path: path.to_owned(), source })?;
        let invalid = |reason| CliError::Config { path: path.to_owned(), reason };
        let value: Value =
            serde_yaml_ng::from_str(&text).map_err(|e| invalid(format!("not YAML: {e}")))?;
        match value {
            Value::Null => Ok(Self { path: path.to_owned(), values: Map::new() }),
            Value::Object(values) => Ok(Self { path: path.to_owned(), values }),
            _ => Err(invalid("must hold `key: value` lines".to_owned())),
        }
    }

    /// Refuses keys that none of the option sets (given with nothing set) knows.
    pub fn check_keys(&self, known: &[Value]) -> Result<(), CliError> {
        let is_known = |key: &str| known.iter().any(|set| set.get(key).is_some());
        match self.values.keys().find(|key| !is_known(key)) {
            None => Ok(()),
            Some(key) => {
                let names = known.iter().filter_map(Value::as_object).flat_map(Map::keys);
                let names: Vec<&str> = names.map(String::as_str).collect();
                Err(CliError::Config {
                    path: self.path.clone(),
                    reason: format!("unknown key `{key}`; known are {}", names.join(", ")),
                })
            }
        }
    }

    /// `flags`, completed from the file where they are unset.
    pub fn complete<T: Serialize + DeserializeOwned>(&self, flags: &T) -> Result<T, CliError> {
        let invalid = |reason| CliError::Config { path: self.path.clone(), reason };
        let mut merged = to_object(flags).map_err(|e| invalid(e.to_string()))?;
        for (key, value) in &mut merged {
            if value.is_null()
                && let Some(from_file) = self.values.get(key)
            {
                *value = from_file.clone();
            }
        }
        serde_path_to_error::deserialize(Value::Object(merged))
            .map_err(|e| invalid(format!("key `{}`: {}", e.path(), e.inner())))
    }
}

fn to_object<T: Serialize>(options: &T) -> Result<Map<String, Value>, serde_json::Error> {
    match serde_json::to_value(options)? {
        Value::Object(map) => Ok(map),
        _ => Ok(Map::new()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
    struct Options {
        port: Option<u16>,
        host: Option<String>,
    }

    fn file(text: &str) -> Result<ConfigFile, CliError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("serve.yaml");
        std::fs::write(&path, text).unwrap();
        ConfigFile::read(Some(&path))
    }

    #[test]
    fn flags_win_over_the_file() {
        let file = file("port: 1\nhost: here\n").unwrap();
        let flags = Options { port: Some(2), host: None };
        let want = Options { port: Some(2), host: Some("here".to_owned()) };
        assert_eq!(file.complete(&flags).unwrap(), want);
    }

    #[test]
    fn errors_name_the_key() {
        let known = serde_json::to_value(Options::default()).unwrap();
        let error = file("prot: 1\n").unwrap().check_keys(&[known]).unwrap_err().to_string();
        assert!(error.contains("`prot`") && error.contains("port"), "{error}");
        let error = file("port: many\n").unwrap().complete(&Options::default()).unwrap_err();
        assert!(error.to_string().contains("`port`"), "{error}");
        assert!(file("- a\n").is_err() && file("a: [\n").is_err());
    }
}
