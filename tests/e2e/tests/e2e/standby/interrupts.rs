//! Placeholder.
use doze_e2e::Case;
pub fn cases() -> Vec<Case> {
    vec![]
}
