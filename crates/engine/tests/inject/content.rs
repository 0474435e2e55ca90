//! What memory, overlay and state file say of their guest.
use std::{
    io::{Read, Seek, SeekFrom, Write},
    path::Path,
};

use serde::{Deserialize, Serialize};

/// Bytes at the begin of memory and at the end of the overlay.
const CONTENT: usize = 256;

/// The same in memory and on the overlay whenever its guest stands still.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Content {
    /// New with each resume of any machine: what ran on fits nothing that was saved before.
    pub generation: u64,
    pub counter: u64,
    /// Machine id of who the guest takes itself for.
    pub identity: String,
    /// Index of its endpoint, which is part of its memory.
    pub guest: usize,
}

/// The state file.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Saved {
    pub content: Content,
    /// Of whom.
    pub instance: String,
    /// Index of what its endpoint knew.
    pub frozen: usize,
}

pub fn write(path: &Path, at: SeekFrom, content: &Content) -> std::io::Result<()> {
    let mut file = std::fs::OpenOptions::new().write(true).open(path)?;
    file.seek(at)?;
    let mut bytes = serde_json::to_vec(content)?;
    assert!(bytes.len() <= CONTENT);
    bytes.resize(CONTENT, b' ');
    file.write_all(&bytes)
}

fn read(path: &Path, at: SeekFrom) -> std::io::Result<Content> {
    let mut file = std::fs::File::open(path)?;
    file.seek(at)?;
    let mut bytes = vec![0; CONTENT];
    file.read_exact(&mut bytes)?;
    Ok(serde_json::from_slice(&bytes)?)
}

pub const MEMORY_AT: SeekFrom = SeekFrom::Start(0);
pub const OVERLAY_AT: SeekFrom = SeekFrom::End(-(CONTENT as i64));

pub fn of_memory(path: &Path) -> std::io::Result<Content> {
    read(path, MEMORY_AT)
}

pub fn of_overlay(path: &Path) -> std::io::Result<Content> {
    read(path, OVERLAY_AT)
}

pub fn saved(state: &Path) -> std::io::Result<Saved> {
    Ok(serde_json::from_slice(&std::fs::read(state)?)?)
}
