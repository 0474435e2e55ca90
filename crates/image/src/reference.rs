//! Image references, normalised as Docker does.

/// `registry/repository[:tag][@digest]`, every part explicit.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Reference {
    pub registry: String,
    pub repository: String,
    pub tag: Option<String>,
    pub digest: Option<String>,
}

/// Names the input, what is wrong and what is allowed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("image reference {input:?}: {reason}")]
pub struct ReferenceError {
    pub input: String,
    pub reason: String,
}

impl std::str::FromStr for Reference {
    type Err = ReferenceError;
    fn from_str(_input: &str) -> Result<Self, ReferenceError> {
        unimplemented!()
    }
}
