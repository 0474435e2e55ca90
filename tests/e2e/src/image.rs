//! Tiny OCI layouts made from a static busybox: they boot in seconds and hold exactly what a case needs.
//!
//! Written by hand rather than with the server's own image code, so that the two can disagree.
use std::{
    fs, io,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

/// One image of a layout: a reference name and its OCI config's `config` object.
#[derive(Debug, Clone)]
pub struct ImageSpec {
    pub name: &'static str,
    pub config: Value,
}

/// A file, folder or link of the layer.
#[derive(Debug, Clone)]
pub enum Entry {
    Dir {
        path: String,
        mode: u32,
    },
    File {
        path: String,
        mode: u32,
        content: Vec<u8>,
    },
    Symlink {
        path: String,
        target: String,
    },
    HardLink {
        path: String,
        target: String,
    },
}

/// The program every tiny image runs by default: says so, then waits, and ends on SIGTERM with 0.
pub const DEFAULT_PROGRAM: [&str; 3] = [
    "/bin/sh",
    "-c",
    "trap 'echo program ends; exit 0' TERM; echo program runs; while :; do sleep 1 & wait $!; done",
];

/// Files of the tiny image: busybox with all its applets as links, and two users.
pub fn busybox_files(busybox: &Path) -> Result<Vec<Entry>> {
    let list = Command::new(busybox)
        .arg("--list")
        .output()
        .context("busybox --list")?;
    ensure!(
        list.status.success(),
        "busybox --list: {}",
        String::from_utf8_lossy(&list.stderr)
    );
    let dir = |path: &str, mode| Entry::Dir {
        path: path.into(),
        mode,
    };
    let file = |path: &str, mode, content: &[u8]| Entry::File {
        path: path.into(),
        mode,
        content: content.to_vec(),
    };
    let mut entries = vec![
        dir("bin", 0o755),
        dir("etc", 0o755),
        dir("home", 0o755),
        dir("root", 0o700),
        dir("srv", 0o755),
        dir("tmp", 0o1777),
        dir("var", 0o755),
        file("bin/busybox", 0o755, &fs::read(busybox).context("busybox")?),
        file(
            "etc/passwd",
            0o644,
            b"root:x:0:0:root:/root:/bin/sh\napp:x:1234:1235:app:/home:/bin/sh\n",
        ),
        file(
            "etc/group",
            0o644,
            b"root:x:0:\napp:x:1235:\nextra:x:1236:app\n",
        ),
        file("etc/from-image", 0o644, b"untouched\n"),
        file("srv/not-executable", 0o644, b"just text\n"),
    ];
    for applet in String::from_utf8_lossy(&list.stdout).lines() {
        if applet != "busybox" {
            entries.push(Entry::Symlink {
                path: format!("bin/{applet}"),
                target: "busybox".into(),
            });
        }
    }
    Ok(entries)
}

/// The images most cases use; all share one layer.
pub fn tiny_images() -> Vec<ImageSpec> {
    let path = "PATH=/bin";
    vec![
        ImageSpec {
            name: "tiny",
            config: json!({"Cmd": DEFAULT_PROGRAM, "Env": [path, "FROM_IMAGE=yes"]}),
        },
        ImageSpec {
            name: "tiny-user",
            config: json!({
                "Entrypoint": ["/bin/sh", "-c"],
                "Cmd": ["echo uid=$(id -u) gid=$(id -g) cwd=$(pwd) home=$HOME; exec sleep 100000"],
                "Env": [path], "User": "app", "WorkingDir": "/srv/made/by/init"
            }),
        },
        ImageSpec {
            name: "tiny-numeric",
            config: json!({"Cmd": ["/bin/sh", "-c", "id; exec sleep 100000"], "Env": [path], "User": "4321:8765"}),
        },
    ]
}

/// Writes a layout folder that holds these images over one layer. Returns manifest digests in order.
pub fn write_layout(dir: &Path, entries: &[Entry], images: &[ImageSpec]) -> Result<Vec<String>> {
    let layer = tar_layer(entries)?;
    write_layout_raw(dir, &layer, images)
}

/// As [`write_layout`], with a layer (an uncompressed tar) of the caller's making.
pub fn write_layout_raw(dir: &Path, layer: &[u8], images: &[ImageSpec]) -> Result<Vec<String>> {
    fs::create_dir_all(dir.join("blobs/sha256"))?;
    fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
    let diff_id = blob(dir, layer)?;
    let mut manifests = Vec::new();
    let mut digests = Vec::new();
    for image in images {
        let config = json!({
            "architecture": "amd64", "os": "linux", "config": image.config,
            "rootfs": {"type": "layers", "diff_ids": [diff_id]},
            "history": [{"created_by": "doze-e2e"}]
        })
        .to_string();
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": blob(dir, config.as_bytes())?, "size": config.len()},
            "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": diff_id, "size": layer.len()}]
        })
        .to_string();
        let digest = blob(dir, manifest.as_bytes())?;
        manifests.push(json!({
            "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest, "size": manifest.len(),
            "platform": {"architecture": "amd64", "os": "linux"},
            "annotations": {"org.opencontainers.image.ref.name": image.name}
        }));
        digests.push(digest);
    }
    let index = json!({"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": manifests});
    fs::write(dir.join("index.json"), index.to_string())?;
    Ok(digests)
}

/// Path of a blob in a layout.
pub fn blob_path(dir: &Path, digest: &str) -> PathBuf {
    dir.join("blobs").join(digest.replace(':', "/"))
}

fn blob(dir: &Path, content: &[u8]) -> Result<String> {
    let digest = format!("sha256:{}", hex::encode(Sha256::digest(content)));
    fs::write(blob_path(dir, &digest), content)?;
    Ok(digest)
}

/// An uncompressed tar of these entries.
pub fn tar_layer(entries: &[Entry]) -> Result<Vec<u8>> {
    let mut tar = tar::Builder::new(Vec::new());
    for entry in entries {
        let mut header = tar::Header::new_ustar();
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_600_000_000);
        match entry {
            Entry::Dir { path, mode } => {
                header.set_entry_type(tar::EntryType::Directory);
                header.set_mode(*mode);
                header.set_size(0);
                tar.append_data(&mut header, path, io::empty())?;
            }
            Entry::File {
                path,
                mode,
                content,
            } => {
                header.set_mode(*mode);
                header.set_size(content.len() as u64);
                tar.append_data(&mut header, path, content.as_slice())?;
            }
            Entry::Symlink { path, target } | Entry::HardLink { path, target } => {
                let hard = matches!(entry, Entry::HardLink { .. });
                header.set_entry_type(if hard {
                    tar::EntryType::Link
                } else {
                    tar::EntryType::Symlink
                });
                header.set_mode(0o777);
                header.set_size(0);
                tar.append_link(&mut header, path, target)?;
            }
        }
    }
    Ok(tar.into_inner()?)
}

/// A tar with one entry whose name the tar crate would refuse to write: bytes go into the header as
/// they are.
pub fn hostile_tar(name: &str, link_target: Option<&str>) -> Result<Vec<u8>> {
    let mut header = tar::Header::new_ustar();
    header.set_mode(0o644);
    let content: &[u8] = if link_target.is_some() {
        b""
    } else {
        b"escaped\n"
    };
    header.set_size(content.len() as u64);
    let raw = header.as_mut_bytes();
    raw[..name.len()].copy_from_slice(name.as_bytes());
    if let Some(target) = link_target {
        // linkname is at offset 157 of a ustar header.
        raw[157..157 + target.len()].copy_from_slice(target.as_bytes());
        header.set_entry_type(tar::EntryType::Link);
    }
    header.set_cksum();
    let mut tar = tar::Builder::new(Vec::new());
    tar.append(&header, content)?;
    Ok(tar.into_inner()?)
}
