//! A file tree in memory, and its form as a layer: sorted, with one fixed time, so that the same
//! tree always gives the same bytes.
use std::{
    collections::BTreeMap,
    io::{self, Write},
};

use anyhow::{Context as _, Result};

/// Time of every file: 2025-01-01 00:00 UTC.
const TIME: u64 = 1_735_689_600;

#[derive(Debug, Clone, PartialEq, Eq)]
enum Content {
    Folder,
    File(Vec<u8>),
    Symlink(String),
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Node {
    content: Content,
    mode: u32,
    /// Both user and group id.
    owner: u64,
}

/// Paths are relative, without a leading slash.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tree(BTreeMap<String, Node>);

impl Tree {
    pub fn folder(&mut self, path: &str, mode: u32, owner: u64) {
        self.parents(path);
        let content = Content::Folder;
        self.0.insert(
            path.to_owned(),
            Node {
                content,
                mode,
                owner,
            },
        );
    }

    pub fn file(&mut self, path: &str, mode: u32, content: impl Into<Vec<u8>>) {
        self.parents(path);
        let content = Content::File(content.into());
        self.0.insert(
            path.to_owned(),
            Node {
                content,
                mode,
                owner: 0,
            },
        );
    }

    pub fn symlink(&mut self, path: &str, target: &str) {
        self.parents(path);
        let content = Content::Symlink(target.to_owned());
        self.0.insert(
            path.to_owned(),
            Node {
                content,
                mode: 0o777,
                owner: 0,
            },
        );
    }

    pub fn contains(&self, path: &str) -> bool {
        self.0.contains_key(path)
    }

    fn parents(&mut self, path: &str) {
        for (slash, _) in path.match_indices('/') {
            let parent = path.get(..slash).unwrap_or_default();
            self.0.entry(parent.to_owned()).or_insert(Node {
                content: Content::Folder,
                mode: 0o755,
                owner: 0,
            });
        }
    }

    /// An uncompressed layer. A parent sorts before what is in it.
    pub fn to_tar(&self) -> Result<Vec<u8>> {
        let mut builder = tar::Builder::new(Vec::new());
        for (path, node) in &self.0 {
            append(&mut builder, path, node).with_context(|| format!("pack {path}"))?;
        }
        Ok(builder.into_inner()?)
    }
}

fn append<W: Write>(builder: &mut tar::Builder<W>, path: &str, node: &Node) -> io::Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_mode(node.mode);
    header.set_uid(node.owner);
    header.set_gid(node.owner);
    header.set_mtime(TIME);
    header.set_size(0);
    match &node.content {
        Content::Folder => {
            header.set_entry_type(tar::EntryType::Directory);
            builder.append_data(&mut header, format!("{path}/"), io::empty())
        }
        Content::File(content) => {
            header.set_entry_type(tar::EntryType::Regular);
            header.set_size(content.len() as u64);
            builder.append_data(&mut header, path, content.as_slice())
        }
        Content::Symlink(target) => {
            header.set_entry_type(tar::EntryType::Symlink);
            builder.append_link(&mut header, path, target)
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn the_order_of_building_does_not_show() {
        let mut one = Tree::default();
        one.file("usr/bin/a", 0o755, *b"a");
        one.folder("usr", 0o755, 0);
        one.symlink("bin", "usr/bin");
        let mut two = Tree::default();
        two.symlink("bin", "usr/bin");
        two.file("usr/bin/a", 0o755, *b"a");
        let bytes = one.to_tar().unwrap();
        assert_eq!(bytes, two.to_tar().unwrap());
        let mut archive = tar::Archive::new(bytes.as_slice());
        let names: Vec<_> = archive
            .entries()
            .unwrap()
            .map(|entry| entry.unwrap().path().unwrap().display().to_string())
            .collect();
        assert_eq!(names, ["bin", "usr/", "usr/bin/", "usr/bin/a"]);
    }
}
