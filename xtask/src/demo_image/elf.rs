//! What a 64-bit little-endian ELF program asks the dynamic loader for.
//!
//! Facts from the System V ABI ("Object Files", "Program Loading and Dynamic Linking") and elf(5).
use anyhow::{Context as _, Result, ensure};

const PT_LOAD: u32 = 1;
const PT_DYNAMIC: u32 = 2;
const PT_INTERP: u32 = 3;
const DT_NEEDED: u64 = 1;
const DT_STRTAB: u64 = 5;
const PROGRAM_HEADER: usize = 56;
const DYNAMIC_ENTRY: usize = 16;

/// Loader and libraries, by the names in the file.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// Path of the dynamic loader; libraries and static programs have none.
    pub interpreter: Option<String>,
    /// File names of libraries (`DT_NEEDED`).
    pub libraries: Vec<String>,
}

struct Segment {
    kind: u32,
    offset: u64,
    address: u64,
    file_size: u64,
}

/// Whether the content begins like an ELF file.
pub fn is_elf(content: &[u8]) -> bool {
    content.starts_with(b"\x7fELF")
}

pub fn needs(content: &[u8]) -> Result<Needs> {
    ensure!(
        is_elf(content) && content.get(4..6) == Some(&[2, 1]),
        "not a 64-bit little-endian ELF file"
    );
    let segments = segments(content)?;
    let mut needs = Needs::default();
    for segment in &segments {
        match segment.kind {
            PT_INTERP => needs.interpreter = Some(text(content, segment.offset)?),
            PT_DYNAMIC => needs.libraries = libraries(content, segment, &segments)?,
            _ => {}
        }
    }
    Ok(needs)
}

fn segments(content: &[u8]) -> Result<Vec<Segment>> {
    let table = usize::try_from(number(content, 32, 8)?)?;
    let count = usize::try_from(number(content, 56, 2)?)?;
    (0..count)
        .map(|index| {
            let at = table
                .checked_add(index * PROGRAM_HEADER)
                .context("program headers are out of range")?;
            Ok(Segment {
                kind: u32::try_from(number(content, at, 4)?)?,
                offset: number(content, at.saturating_add(8), 8)?,
                address: number(content, at.saturating_add(16), 8)?,
                file_size: number(content, at.saturating_add(32), 8)?,
            })
        })
        .collect()
}

fn libraries(content: &[u8], dynamic: &Segment, segments: &[Segment]) -> Result<Vec<String>> {
    let start = usize::try_from(dynamic.offset)?;
    let count = usize::try_from(dynamic.file_size)? / DYNAMIC_ENTRY;
    let mut names = Vec::new();
    let mut strings = None;
    for index in 0..count {
        let at = start.saturating_add(index * DYNAMIC_ENTRY);
        let value = number(content, at.saturating_add(8), 8)?;
        match number(content, at, 8)? {
            DT_NEEDED => names.push(value),
            DT_STRTAB => strings = Some(value),
            _ => {}
        }
    }
    if names.is_empty() {
        return Ok(Vec::new());
    }
    // The table's place is given as an address; the loaded segment around it tells the offset.
    let address = strings.context("no string table")?;
    let offset = segments
        .iter()
        .filter(|s| s.kind == PT_LOAD)
        .find_map(|s| {
            let within = address
                .checked_sub(s.address)
                .filter(|w| *w < s.file_size)?;
            s.offset.checked_add(within)
        })
        .context("the string table is in no segment")?;
    names
        .into_iter()
        .map(|name| text(content, offset.saturating_add(name)))
        .collect()
}

fn number(content: &[u8], at: usize, bytes: usize) -> Result<u64> {
    let field = content
        .get(at..at.saturating_add(bytes))
        .with_context(|| format!("the file ends before offset {at}"))?;
    Ok(field
        .iter()
        .rev()
        .fold(0, |sum, byte| sum << 8 | u64::from(*byte)))
}

fn text(content: &[u8], at: u64) -> Result<String> {
    let rest = content
        .get(usize::try_from(at)?..)
        .context("a string is out of range")?;
    let end = rest
        .iter()
        .position(|byte| *byte == 0)
        .context("a string has no end")?;
    Ok(String::from_utf8(
        rest.get(..end).unwrap_or_default().to_vec(),
    )?)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn this_test_program_needs_libc_and_a_loader() {
        let content = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        let needs = needs(&content).unwrap();
        assert!(needs.interpreter.unwrap().contains("ld-linux"));
        assert!(
            needs.libraries.iter().any(|name| name == "libc.so.6"),
            "{:?}",
            needs.libraries
        );
    }

    #[test]
    fn cut_off_and_foreign_files_are_errors() {
        let content = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        assert!(needs(&content[..70]).is_err());
        assert!(needs(b"#!/bin/sh\n").is_err());
        assert!(needs(b"").is_err());
    }
}
