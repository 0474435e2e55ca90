//! Platforms: which one is wanted, which an image has.
use super::PlatformField;
use crate::ImageError;

/// `os/architecture[/variant]` as somebody asked for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Wanted {
    os: String,
    architecture: String,
    variant: Option<String>,
}

impl Wanted {
    pub(crate) const DEFAULT: &str = "linux/amd64";

    /// # Errors
    /// `Platform` when the text is not of that form.
    pub(crate) fn parse(text: Option<&str>) -> Result<Self, ImageError> {
        let text = text.unwrap_or(Self::DEFAULT);
        let good = |part: &&str| {
            !part.is_empty()
                && part
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'))
        };
        let parts: Vec<&str> = text.split('/').collect();
        let (os, architecture, variant) = match parts.as_slice() {
            [os, architecture] => (os, architecture, None),
            [os, architecture, variant] => (os, architecture, Some(variant)),
            _ => return Err(Self::malformed(text)),
        };
        if !parts.iter().all(good) {
            return Err(Self::malformed(text));
        }
        Ok(Self {
            os: (*os).to_owned(),
            architecture: (*architecture).to_owned(),
            variant: variant.map(|v| (*v).to_owned()),
        })
    }

    fn malformed(text: &str) -> ImageError {
        ImageError::Platform {
            wanted: text.to_owned(),
            found: "one of the form os/architecture[/variant], for example linux/amd64".into(),
        }
    }

    /// A variant nobody asked for does not matter.
    pub(crate) fn matches(&self, has: &PlatformField) -> bool {
        self.os == has.os
            && self.architecture == has.architecture
            && (self.variant.is_none() || self.variant == has.variant)
    }

    pub(crate) fn not_in(&self, has: &[PlatformField]) -> ImageError {
        let mut found: Vec<String> = has.iter().map(text).collect();
        found.sort();
        found.dedup();
        let variant = self.variant.as_ref().map(|v| format!("/{v}"));
        ImageError::Platform {
            wanted: format!(
                "{}/{}{}",
                self.os,
                self.architecture,
                variant.unwrap_or_default()
            ),
            found: if found.is_empty() {
                "none".into()
            } else {
                found.join(", ")
            },
        }
    }
}

pub(crate) fn text(platform: &PlatformField) -> String {
    let PlatformField {
        os,
        architecture,
        variant,
    } = platform;
    match variant {
        Some(variant) => format!("{os}/{architecture}/{variant}"),
        None => format!("{os}/{architecture}"),
    }
}
