//! One configured value, whichever place it comes from.
use std::{net::Ipv4Addr, time::Duration};

use doze_host::net::Subnet;

/// A value as written. The environment knows only text, so text from there may stand for any type;
/// in the file a number is a number.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    File(toml::Value),
    Environment(String),
}

/// What is wrong with a value; the reader adds the key and the place.
pub(super) type Read<T> = Result<T, String>;

impl Value {
    pub(super) fn text(&self) -> Read<String> {
        match self {
            Value::Environment(text) | Value::File(toml::Value::String(text)) => Ok(text.clone()),
            other => Err(other.mismatch("a text")),
        }
    }

    pub(super) fn integer(&self) -> Read<i64> {
        match self {
            Value::File(toml::Value::Integer(number)) => Ok(*number),
            Value::Environment(text) => text.parse().map_err(|_| self.mismatch("a whole number")),
            other => Err(other.mismatch("a whole number")),
        }
    }

    pub(super) fn boolean(&self) -> Read<bool> {
        match self {
            Value::File(toml::Value::Boolean(flag)) => Ok(*flag),
            Value::Environment(text) => text.parse().map_err(|_| self.mismatch("true or false")),
            other => Err(other.mismatch("true or false")),
        }
    }

    /// A list of texts; comma-separated in the environment.
    pub(super) fn texts(&self) -> Read<Vec<String>> {
        match self {
            Value::File(toml::Value::Array(items)) => items
                .iter()
                .map(|item| match item {
                    toml::Value::String(text) => Ok(text.clone()),
                    _ => Err(self.mismatch("a list of texts")),
                })
                .collect(),
            Value::Environment(text) => Ok(text
                .split(',')
                .map(|item| item.trim().to_owned())
                .filter(|item| !item.is_empty())
                .collect()),
            other @ Value::File(_) => Err(other.mismatch("a list of texts")),
        }
    }

    /// Bytes: a size text (`"1GB"`, binary) or a whole number.
    pub(super) fn size(&self) -> Read<u64> {
        match self {
            Value::File(toml::Value::Integer(number)) => {
                u64::try_from(*number).map_err(|_| self.mismatch("a size, for example \"1GB\""))
            }
            _ => doze_api::parse_size(&self.text()?).map_err(|error| error.to_string()),
        }
    }

    /// A Go duration above zero.
    pub(super) fn duration(&self) -> Read<Duration> {
        let text = self.text()?;
        doze_lifecycle::duration::parse(&text)
            .map_err(|error| error.to_string())?
            .to_std()
            .filter(|duration| !duration.is_zero())
            .ok_or_else(|| format!("{text:?} is not above zero"))
    }

    /// A number of `T`'s range that is at least 1.
    pub(super) fn count<T: TryFrom<i64>>(&self) -> Read<T> {
        let number = self.integer()?;
        T::try_from(number)
            .ok()
            .filter(|_| number >= 1)
            .ok_or_else(|| format!("{number} is out of range; allowed: 1 and more"))
    }

    pub(super) fn subnet(&self) -> Read<Subnet> {
        let text = self.text()?;
        subnet(&text)
            .ok_or_else(|| format!("{text:?} is not a network; allowed: ADDRESS/PREFIX, prefix 8 to 30, host bits zero, for example 10.77.0.0/16"))
    }

    pub(super) fn address(&self) -> Read<Ipv4Addr> {
        let text = self.text()?;
        text.parse()
            .map_err(|_| format!("{text:?} is not an IPv4 address"))
    }

    /// One of a few words.
    pub(super) fn choice<T: Copy>(&self, choices: &[(&str, T)]) -> Read<T> {
        let text = self.text()?;
        choices
            .iter()
            .find(|(word, _)| *word == text)
            .map(|(_, value)| *value)
            .ok_or_else(|| {
                let words: Vec<_> = choices.iter().map(|(word, _)| *word).collect();
                format!("{text:?} is not allowed; allowed: {}", words.join(", "))
            })
    }

    fn mismatch(&self, wanted: &str) -> String {
        match self {
            Value::File(value) => format!("{value} is not {wanted}"),
            Value::Environment(text) => format!("{text:?} is not {wanted}"),
        }
    }
}

fn subnet(text: &str) -> Option<Subnet> {
    let (network, prefix) = text.split_once('/')?;
    let network: Ipv4Addr = network.parse().ok()?;
    let prefix: u8 = prefix.parse().ok().filter(|p| (8..=30).contains(p))?;
    let host_bits = u32::from(network) & (u32::MAX >> prefix);
    (host_bits == 0).then_some(Subnet { network, prefix })
}
