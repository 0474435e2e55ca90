//! Image references, normalised as Docker does.
//!
//! People write `alpine`, registries and records need `docker.io/library/alpine:latest`. The rules
//! and their oddities (which first component is a registry, what `library/` is for) are those of
//! the `distribution/reference` module, `normalize.go` and `regexp.go`; a name both a tag and a
//! digest loses the tag, as in its `ParseDockerRef`: the digest says all.
//!
//! ```text
//!   [registry[:port]/]path[/path...][:tag][@sha256:hex]
//! ```
//!
//! Narrower than Docker in three places: digests are SHA-256 only, a registry is at most 255
//! characters, and a first component that looks like a registry but is not a valid one
//! (`foo_bar.com/x`) is refused instead of becoming part of the path.
use std::{fmt, str::FromStr};

use crate::digest::Digest;

const DEFAULT_REGISTRY: &str = "docker.io";
/// Older name of the same registry, still found in people's scripts.
const LEGACY_REGISTRY: &str = "index.docker.io";
/// Namespace of Docker's official images, left out by people.
const OFFICIAL: &str = "library/";
const DEFAULT_TAG: &str = "latest";
const MAX_REGISTRY: usize = 255;
const MAX_REPOSITORY: usize = 255;
const MAX_TAG: usize = 128;

/// `registry/repository[:tag][@digest]`, every part explicit.
///
/// A parsed reference has a tag or a digest, never both: without either the tag is `latest`, with
/// both the tag is dropped. `Display` prints the normalised form, which parses to the same value.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Reference {
    /// Host with optional port.
    pub registry: String,
    /// Path inside the registry, at most 255 characters.
    pub repository: String,
    pub tag: Option<String>,
    /// `sha256:<64 hex>`.
    pub digest: Option<String>,
}

/// Names the input, what is wrong and what is allowed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("image reference {input:?}: {reason}")]
pub struct ReferenceError {
    pub input: String,
    pub reason: String,
}

impl Reference {
    /// `registry/repository`, without tag and digest.
    pub fn name(&self) -> String {
        format!("{}/{}", self.registry, self.repository)
    }

    /// The short form people write: without `docker.io/` and `library/`. Parses to the same value.
    pub fn familiar(&self) -> String {
        let name = self.name();
        let short = match name.strip_prefix("docker.io/") {
            None => name.as_str(),
            Some(path) => match path.strip_prefix(OFFICIAL) {
                // library/a/b must keep its prefix: a/b is another repository.
                Some(official) if !official.contains('/') => official,
                _ => path,
            },
        };
        format!("{short}{}", self.suffix())
    }

    /// The same repository at exactly this content.
    pub fn at_digest(&self, digest: &str) -> Self {
        Self {
            tag: None,
            digest: Some(digest.to_owned()),
            ..self.clone()
        }
    }

    fn suffix(&self) -> String {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => format!("@{digest}"),
            (None, Some(tag)) => format!(":{tag}"),
            (None, None) => format!(":{DEFAULT_TAG}"),
        }
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}{}", self.registry, self.repository, self.suffix())
    }
}

impl FromStr for Reference {
    type Err = ReferenceError;

    fn from_str(input: &str) -> Result<Self, ReferenceError> {
        parse(input).map_err(|reason| ReferenceError {
            input: shorten(input),
            reason,
        })
    }
}

/// An error must not carry a megabyte of somebody's input.
fn shorten(input: &str) -> String {
    const SHOWN: usize = 300;
    match input.char_indices().nth(SHOWN) {
        None => input.to_owned(),
        Some((end, _)) => format!("{}...", &input[..end]),
    }
}

fn parse(input: &str) -> Result<Reference, String> {
    if input.is_empty() {
        return Err("is empty; allowed: [registry/]path[:tag][@sha256:hex]".into());
    }
    if input.len() == 64
        && input
            .bytes()
            .all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
    {
        return Err("64 hexadecimal digits would be confused with a digest; \
             write name@sha256:digits"
            .into());
    }
    let (registry, rest) = split_registry(input);
    let (rest, digest) = match rest.split_once('@') {
        Some((rest, digest)) => (rest, Some(digest.parse::<Digest>()?.to_string())),
        None => (rest, None),
    };
    let (path, tag) = match rest.split_once(':') {
        Some((path, tag)) => (path, Some(tag)),
        None => (rest, None),
    };
    let official = registry == DEFAULT_REGISTRY && !path.contains('/');
    let repository = format!("{}{path}", if official { OFFICIAL } else { "" });

    check_registry(registry)?;
    check_repository(path, &repository)?;
    tag.map_or(Ok(()), check_tag)?;
    let tag = match digest {
        Some(_) => None,
        None => Some(tag.unwrap_or(DEFAULT_TAG).to_owned()),
    };
    Ok(Reference {
        registry: registry.to_owned(),
        repository,
        tag,
        digest,
    })
}

/// The first component is a registry when nothing else could look like that.
fn split_registry(input: &str) -> (&str, &str) {
    match input.split_once('/') {
        Some((LEGACY_REGISTRY, rest)) => (DEFAULT_REGISTRY, rest),
        Some((first, rest))
            if first == "localhost"
                || first.contains(['.', ':'])
                || first.chars().any(char::is_uppercase) =>
        {
            (first, rest)
        }
        _ => (DEFAULT_REGISTRY, input),
    }
}

fn check_registry(registry: &str) -> Result<(), String> {
    let refuse = |what: &str| {
        Err(format!(
            "registry {:?} {what}; allowed: host names, IPv4 addresses or [IPv6], \
             with an optional :port",
            shorten(registry)
        ))
    };
    if registry.len() > MAX_REGISTRY {
        return refuse("is longer than 255 characters");
    }
    // A bracketed address contains colons of its own, so the port is looked for behind it.
    let host_end = match registry.find(']') {
        Some(bracket) => bracket + 1,
        None => registry.find(':').unwrap_or(registry.len()),
    };
    let (host, port) = registry.split_at(host_end);
    let address = host.strip_prefix('[').and_then(|h| h.strip_suffix(']'));
    let host_is_good = match address {
        Some(address) => is_ipv6_like(address),
        None => host.split('.').all(is_domain_component),
    };
    if !host_is_good {
        return refuse("is not a host name or address");
    }
    match port.strip_prefix(':') {
        None if port.is_empty() => Ok(()),
        Some(port) if !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit()) => Ok(()),
        _ => refuse("has a malformed port"),
    }
}

fn is_ipv6_like(address: &str) -> bool {
    !address.is_empty() && address.bytes().all(|b| b.is_ascii_hexdigit() || b == b':')
}

fn is_domain_component(part: &str) -> bool {
    !part.is_empty()
        && part.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
        && !part.starts_with('-')
        && !part.ends_with('-')
}

fn check_repository(written: &str, full: &str) -> Result<(), String> {
    if written.chars().any(char::is_uppercase) {
        return Err(format!(
            "repository {:?} has upper-case letters; allowed: lower case",
            shorten(written)
        ));
    }
    if full.len() > MAX_REPOSITORY {
        return Err("repository is longer than 255 characters".into());
    }
    match full.split('/').find(|part| !is_path_component(part)) {
        None => Ok(()),
        Some(part) => Err(format!(
            "repository component {:?} is malformed; allowed: a-z and 0-9, separated by one dot, \
             one or two underscores, or hyphens",
            shorten(part)
        )),
    }
}

/// `alphanumeric (separator alphanumeric)*` with separator `.`, `_`, `__` or any number of `-`.
fn is_path_component(part: &str) -> bool {
    let alphanumeric = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let separator = |s: &str| matches!(s, "." | "_" | "__") || s.bytes().all(|b| b == b'-');
    part.starts_with(alphanumeric)
        && part.ends_with(alphanumeric)
        && part.split(alphanumeric).all(separator)
}

fn check_tag(tag: &str) -> Result<(), String> {
    let first = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let later = |c: char| first(c) || matches!(c, '.' | '-');
    if tag.starts_with(first) && tag.chars().all(later) && tag.len() <= MAX_TAG {
        return Ok(());
    }
    Err(format!(
        "tag {:?} is malformed; allowed: 1 to 128 of letters, digits, underscore, dot and hyphen, \
         not beginning with dot or hyphen",
        shorten(tag)
    ))
}

#[cfg(test)]
mod tests;
