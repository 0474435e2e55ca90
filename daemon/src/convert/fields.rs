//! Rules of single fields. Each complaint names the field, the value and what is allowed.
use std::collections::BTreeMap;

use crate::http::errors::ApiError;

const MB: u64 = 1 << 20;
/// A kernel and its initramfs do not come up in less.
const MIN_MEMORY: u64 = 64 * MB;
/// ext4 with a journal does not fit into less.
const MIN_OVERLAY: u64 = 16 * MB;
pub(crate) const MAX_NAME: usize = 63;
const MAX_TAGS: usize = 50;
const MAX_TAG_KEY: usize = 128;
const MAX_TAG_VALUE: usize = 256;

pub(crate) type Checked<T> = Result<T, ApiError>;

/// `field: value is not allowed; allowed: ...`
pub(crate) fn invalid(
    code: &str,
    field: &str,
    value: impl std::fmt::Display,
    allowed: &str,
) -> ApiError {
    ApiError::invalid(
        code,
        format!("{field}: {value} is not allowed; allowed: {allowed}"),
    )
}

/// `^[a-z0-9]([a-z0-9-]*[a-z0-9])?$`, at most 63 characters.
pub(crate) fn instance_name(name: &str) -> Checked<()> {
    label("name", name, MAX_NAME)
}

/// The same alphabet for whatever else has a name.
pub(crate) fn label(field: &str, text: &str, max: usize) -> Checked<()> {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let ok = (1..=max).contains(&text.len())
        && text.bytes().all(|b| inner(b) || b == b'-')
        && !text.starts_with('-')
        && !text.ends_with('-');
    match ok {
        true => Ok(()),
        false => Err(invalid(
            "invalid_name",
            field,
            format!("{text:?}"),
            &format!("1 to {max} lower-case letters, digits and dashes, no dash at either end"),
        )),
    }
}

/// Memory of an instance, in bytes.
pub(crate) fn memory_size(text: &str) -> Checked<u64> {
    size("size", text, MIN_MEMORY)
}

/// Writable disk of an instance, in bytes.
pub(crate) fn overlay_size(text: &str) -> Checked<u64> {
    size("overlay_size", text, MIN_OVERLAY)
}

fn size(field: &str, text: &str, minimum: u64) -> Checked<u64> {
    let bytes = any_size(field, text)?;
    match bytes >= minimum && bytes.is_multiple_of(MB) {
        true => Ok(bytes),
        false => Err(invalid(
            "invalid_size",
            field,
            format!("{text:?}"),
            &format!("multiples of 1MB from {}", doze_api::format_size(minimum)),
        )),
    }
}

pub(crate) fn any_size(field: &str, text: &str) -> Checked<u64> {
    doze_api::parse_size(text)
        .map_err(|error| ApiError::invalid("invalid_size", format!("{field}: {error}")))
}

/// Bytes (or bits) per second: `100MB/s`, `1Gbps`, a bare number.
pub(crate) fn rate(field: &str, text: &str) -> Checked<u64> {
    let amount = text
        .strip_suffix("/s")
        .map(str::to_owned)
        .or_else(|| Some(text.strip_suffix("bps")?.to_owned()))
        .unwrap_or_else(|| text.to_owned());
    doze_api::parse_size(&amount).map_err(|_| {
        invalid(
            "invalid_size",
            field,
            format!("{text:?}"),
            "a rate, for example 100MB/s or 1Gbps",
        )
    })
}

/// A Go duration of zero or more, in nanoseconds.
pub(crate) fn duration(field: &str, text: &str) -> Checked<std::time::Duration> {
    let parsed = doze_lifecycle::duration::parse(text)
        .map_err(|error| ApiError::invalid("invalid_field", format!("{field}: {error}")))?;
    parsed.to_std().ok_or_else(|| {
        invalid(
            "invalid_field",
            field,
            format!("{text:?}"),
            "a duration that is not negative",
        )
    })
}

/// The platform images and guests have on this host.
pub(crate) fn host_platform() -> String {
    format!("linux/{}", host_arch())
}

/// The host's architecture in the words of OCI.
pub(crate) fn host_arch() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// `os/arch[/variant]` that this host can run.
pub(crate) fn platform(text: &str) -> Checked<()> {
    let host = host_platform();
    let refuse =
        |allowed: &str| invalid("invalid_platform", "platform", format!("{text:?}"), allowed);
    let parts: Vec<&str> = text.split('/').collect();
    let word = |part: &&str| {
        !part.is_empty()
            && part
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-".contains(&b))
    };
    if !(2..=3).contains(&parts.len()) || !parts.iter().all(word) {
        return Err(refuse(&format!("os/arch[/variant], on this host {host}")));
    }
    match parts[0] == "linux" && parts[1] == host_arch() {
        true => Ok(()),
        false => Err(refuse(&format!("{host} (what this host can run)"))),
    }
}

/// Environment: names without `=`, nothing with a NUL byte (execve(2) could not carry it).
pub(crate) fn environment(field: &str, env: &BTreeMap<String, String>) -> Vec<ApiError> {
    env.iter()
        .filter(|(name, value)| {
            name.is_empty() || name.contains(['=', '\0']) || value.contains('\0')
        })
        .map(|(name, _)| {
            invalid(
                "invalid_field",
                field,
                format!("the variable {name:?}"),
                "a name that is not empty and without '=', name and value without NUL bytes",
            )
        })
        .collect()
}

/// Command words: nothing with a NUL byte.
pub(crate) fn words(field: &str, words: &[String]) -> Checked<()> {
    match words.iter().position(|word| word.contains('\0')) {
        None => Ok(()),
        Some(index) => Err(invalid(
            "invalid_field",
            &format!("{field}[{index}]"),
            "a text with a NUL byte",
            "text without NUL bytes",
        )),
    }
}

/// The contract's limits on tags: 50 at most, keys of 1 to 128 and values of up to 256 characters.
pub(crate) fn tags(tags: &BTreeMap<String, String>) -> Vec<ApiError> {
    tags_in("tags", tags)
}

/// The same limits for tags that stand in another field.
pub(crate) fn tags_in(field: &str, tags: &BTreeMap<String, String>) -> Vec<ApiError> {
    let mut complaints = Vec::new();
    if tags.len() > MAX_TAGS {
        complaints.push(invalid(
            "invalid_field",
            field,
            format!("{} entries", tags.len()),
            &format!("at most {MAX_TAGS}"),
        ));
    }
    for (key, value) in tags {
        let key_ok = (1..=MAX_TAG_KEY).contains(&key.chars().count());
        let value_ok = value.chars().count() <= MAX_TAG_VALUE;
        let control = key.chars().chain(value.chars()).any(char::is_control);
        if !key_ok || !value_ok || control {
            complaints.push(invalid(
                "invalid_field",
                field,
                format!("{key:?}"),
                &format!("keys of 1 to {MAX_TAG_KEY} and values of up to {MAX_TAG_VALUE} characters, no control characters"),
            ));
        }
    }
    complaints
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
    use super::*;

    #[test]
    fn instance_names() {
        for good in ["a", "0", "a-b", "a--b", &"a".repeat(63)] {
            assert_eq!(instance_name(good), Ok(()), "{good}");
        }
        for bad in [
            "",
            "-",
            "-a",
            "a-",
            "A",
            "a_b",
            "a.b",
            "ü",
            "a b",
            &"a".repeat(64),
        ] {
            let error = instance_name(bad).unwrap_err();
            assert_eq!(error.body.code, "invalid_name", "{bad}");
            assert!(error.body.message.contains(&format!("{bad:?}")));
        }
    }

    #[test]
    fn sizes() {
        assert_eq!(memory_size("1GB"), Ok(1 << 30));
        assert_eq!(memory_size("134217728"), Ok(128 << 20));
        for bad in ["", "1", "0", "63MB", "100000000", "lots", "-1GB"] {
            let error = memory_size(bad).unwrap_err();
            assert_eq!(error.body.code, "invalid_size", "{bad}");
            assert!(error.body.message.starts_with("size: "), "{error}");
        }
        assert!(
            overlay_size("15MB")
                .unwrap_err()
                .body
                .message
                .contains("16MB")
        );
    }

    #[test]
    fn rates() {
        assert_eq!(rate("x", "100MB/s"), Ok(100 << 20));
        assert!(rate("x", "1Gbps").is_ok());
        assert_eq!(rate("x", "0"), Ok(0));
        for bad in ["fast", "1 per day", "MB/s"] {
            assert!(rate("x", bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn platforms() {
        let host = host_platform();
        assert_eq!(platform(&host), Ok(()));
        assert_eq!(platform(&format!("{host}/v2")), Ok(()));
        for bad in [
            "",
            "linux",
            "linux/",
            "linux/amd64/v1/x",
            "Linux/amd64",
            "windows/amd64",
            "linux/s390x",
        ] {
            assert_eq!(
                platform(bad).unwrap_err().body.code,
                "invalid_platform",
                "{bad}"
            );
        }
    }

    #[test]
    fn environments_and_tags() {
        let map = |pairs: &[(&str, &str)]| {
            pairs
                .iter()
                .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
                .collect::<BTreeMap<_, _>>()
        };
        assert_eq!(environment("env", &map(&[("A", "="), ("a.b", "")])), []);
        assert_eq!(
            environment("env", &map(&[("", "x"), ("A=B", ""), ("C", "\0")])).len(),
            3
        );
        assert_eq!(
            tags(&map(&[("team", ""), (&"k".repeat(128), &"ü".repeat(256))])),
            []
        );
        assert_eq!(tags(&map(&[("", "x")])).len(), 1);
        assert_eq!(tags(&map(&[(&"k".repeat(129), "x")])).len(), 1);
        assert_eq!(tags(&map(&[("k", &"v".repeat(257))])).len(), 1);
        let many: BTreeMap<_, _> = (0..51).map(|i| (i.to_string(), String::new())).collect();
        assert_eq!(tags(&many).len(), 1);
    }
}
