//! Collects values from their places and hands them out by key, remembering everything that is wrong.
use std::{collections::BTreeMap, path::Path};

use super::{
    ConfigError, ConfigErrors,
    value::{Read, Value},
};

/// Prefix of the environment variables; a section and its key are joined by two underscores.
const PREFIX: &str = "DOZE_";

/// Variables of ours that configure something else: the CLI, the build, the tests.
const NOT_CONFIGURATION: [&str; 9] = [
    "BIN",
    "CONFIG",
    "GUEST_BIN",
    "KERNEL",
    "KERNEL_MODULES",
    "KILL_AT",
    "MARK",
    "TOKEN",
    "URL",
];
const NOT_CONFIGURATION_PREFIXES: [&str; 5] = ["BENCH_", "DEMO_", "E2E_", "SDK_", "TEST_"];

fn joined(section: &str, key: String) -> String {
    match section {
        "" => key,
        section => format!("{section}.{key}"),
    }
}

struct Entry {
    value: Value,
    /// For messages: the file or the variable's name.
    place: String,
}

#[derive(Default)]
pub(super) struct Reader {
    file: BTreeMap<String, Entry>,
    /// Apart from the file's: an unknown variable must not hide an unknown key of the same name.
    variables: BTreeMap<String, Entry>,
    errors: Vec<ConfigError>,
    known: Vec<&'static str>,
}

impl Reader {
    pub(super) fn add_file(&mut self, path: &Path, text: &str) {
        let place = path.display().to_string();
        match text.parse::<toml::Table>() {
            Ok(table) => self.flatten("", table, &place),
            // The parser's message shows the line and points at the place in it.
            Err(error) => self.error(&place, error.to_string().trim_end().to_owned()),
        }
    }

    fn flatten(&mut self, section: &str, table: toml::Table, place: &str) {
        for (key, value) in table {
            match value {
                toml::Value::Table(table) => self.flatten(&joined(section, key), table, place),
                value => {
                    let key = joined(section, key);
                    let entry = Entry {
                        value: Value::File(value),
                        place: place.to_owned(),
                    };
                    self.file.insert(key, entry);
                }
            }
        }
    }

    /// Variables win over the file. An empty one counts as not set.
    pub(super) fn add_environment(
        &mut self,
        variables: impl IntoIterator<Item = (String, String)>,
    ) {
        for (name, text) in variables {
            let Some(rest) = name.strip_prefix(PREFIX) else {
                continue;
            };
            let other = NOT_CONFIGURATION.contains(&rest)
                || NOT_CONFIGURATION_PREFIXES
                    .iter()
                    .any(|prefix| rest.starts_with(prefix));
            if other || text.is_empty() {
                continue;
            }
            let key = rest.to_ascii_lowercase().replace("__", ".");
            let entry = Entry {
                value: Value::Environment(text),
                place: name,
            };
            self.variables.insert(key, entry);
        }
    }

    /// The value of `key` if it is set and right.
    pub(super) fn optional<T>(
        &mut self,
        key: &'static str,
        read: impl FnOnce(&Value) -> Read<T>,
    ) -> Option<T> {
        self.known.push(key);
        let file = self.file.remove(key);
        let entry = self.variables.remove(key).or(file)?;
        match read(&entry.value) {
            Ok(value) => Some(value),
            Err(reason) => {
                self.error(key, format!("{reason} (in {})", entry.place));
                None
            }
        }
    }

    pub(super) fn or<T>(
        &mut self,
        key: &'static str,
        default: T,
        read: impl FnOnce(&Value) -> Read<T>,
    ) -> T {
        self.optional(key, read).unwrap_or(default)
    }

    pub(super) fn error(&mut self, key: &str, reason: String) {
        self.errors.push(ConfigError {
            key: key.to_owned(),
            reason,
        });
    }

    /// Every key asked for so far.
    #[cfg(test)]
    pub(super) fn known(&self) -> &[&'static str] {
        &self.known
    }

    /// An unknown key of the file is a mistake. An unknown variable is a warning, which this returns:
    /// the environment is not only ours. Kubernetes adds `DOZE_SERVICE_HOST` for a service `doze`.
    pub(super) fn finish(mut self) -> Result<Vec<String>, ConfigErrors> {
        for (key, entry) in std::mem::take(&mut self.file) {
            let near = nearest(&key, &self.known)
                .map(|known| format!("; did you mean {known}?"))
                .unwrap_or_default();
            self.error(&key, format!("unknown key (in {}){near}", entry.place));
        }
        if !self.errors.is_empty() {
            return Err(ConfigErrors(self.errors));
        }
        let warnings = self.variables.iter().map(|(key, entry)| {
            let near = nearest(key, &self.known)
                .map(|known| format!("; did you mean {}?", variable(known)))
                .unwrap_or_default();
            // The value is left out: it may be a secret.
            let name = entry.place.escape_debug();
            format!("{name}: no configuration key has this variable; it is ignored{near}")
        });
        Ok(warnings.collect())
    }
}

/// The variable that sets `key`.
fn variable(key: &str) -> String {
    format!("{PREFIX}{}", key.replace('.', "__").to_ascii_uppercase())
}

/// The known key that differs least, if it differs by few letters or only in its section.
fn nearest(key: &str, known: &[&'static str]) -> Option<&'static str> {
    let last = |key: &str| key.rsplit('.').next().map(str::to_owned);
    known
        .iter()
        .map(|known| (distance(key, known), *known))
        .min()
        .filter(|(distance, _)| *distance <= 2)
        .map(|(_, known)| known)
        .or_else(|| known.iter().find(|known| last(known) == last(key)).copied())
}

/// Levenshtein distance in bytes.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = i;
        row[0] = i + 1;
        for (j, y) in b.bytes().enumerate() {
            let substitution = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = substitution.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}
