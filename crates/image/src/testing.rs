//! Builds small images for the tests: layers entry by entry, layouts and archives around them.
#![allow(clippy::unwrap_used, reason = "tests")]
use std::{
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
};

use serde_json::{Value, json};

use crate::digest::Digest;

/// One layer's archive. Names and links are written as given, however hostile.
#[derive(Default)]
pub(crate) struct LayerBuilder {
    bytes: Vec<u8>,
}

/// What the shortcuts leave out.
#[derive(Clone, Copy)]
pub(crate) struct Meta {
    pub mode: u32,
    pub uid: u64,
    pub gid: u64,
    pub mtime: u64,
}

impl Default for Meta {
    fn default() -> Self {
        Self {
            mode: 0o644,
            uid: 0,
            gid: 0,
            mtime: 1_000_000_000,
        }
    }
}

impl LayerBuilder {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    pub(crate) fn file(self, name: &str, content: &[u8]) -> Self {
        self.entry(b'0', name, "", content, Meta::default())
    }

    pub(crate) fn folder(self, name: &str) -> Self {
        let meta = Meta {
            mode: 0o755,
            ..Meta::default()
        };
        self.entry(b'5', name, "", b"", meta)
    }

    pub(crate) fn symlink(self, name: &str, target: &str) -> Self {
        self.entry(b'2', name, target, b"", Meta::default())
    }

    pub(crate) fn hard_link(self, name: &str, target: &str) -> Self {
        self.entry(b'1', name, target, b"", Meta::default())
    }

    pub(crate) fn entry(
        self,
        flag: u8,
        name: &str,
        link: &str,
        content: &[u8],
        meta: Meta,
    ) -> Self {
        self.raw(
            flag,
            name.as_bytes(),
            link.as_bytes(),
            content,
            meta,
            (0, 0),
        )
    }

    pub(crate) fn device(self, flag: u8, name: &str, device: (u32, u32)) -> Self {
        self.raw(flag, name.as_bytes(), b"", b"", Meta::default(), device)
    }

    /// GNU header; names longer than the field become `L` and `K` entries.
    pub(crate) fn raw(
        mut self,
        flag: u8,
        name: &[u8],
        link: &[u8],
        content: &[u8],
        meta: Meta,
        device: (u32, u32),
    ) -> Self {
        if name.len() > 100 {
            self = self.raw(b'L', b"long", b"", &[name, b"\0"].concat(), meta, (0, 0));
        }
        if link.len() > 100 {
            self = self.raw(b'K', b"long", b"", &[link, b"\0"].concat(), meta, (0, 0));
        }
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::new(flag));
        header.set_size(content.len() as u64);
        header.set_mode(meta.mode);
        header.set_uid(meta.uid);
        header.set_gid(meta.gid);
        header.set_mtime(meta.mtime);
        let gnu = header.as_gnu_mut().unwrap();
        let short = &name[..name.len().min(100)];
        gnu.name[..short.len()].copy_from_slice(short);
        let short = &link[..link.len().min(100)];
        gnu.linkname[..short.len()].copy_from_slice(short);
        gnu.set_device_major(device.0);
        gnu.set_device_minor(device.1);
        header.set_cksum();
        self.bytes.extend_from_slice(header.as_bytes());
        self.bytes.extend_from_slice(content);
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        self
    }

    /// A PAX header for the next entry.
    pub(crate) fn pax(self, records: &[(&str, &[u8])]) -> Self {
        let mut content = Vec::new();
        for (key, value) in records {
            let rest = key.len() + value.len() + 3;
            let mut length = rest + 1;
            while rest + length.to_string().len() != length {
                length = rest + length.to_string().len();
            }
            content.extend_from_slice(format!("{length} {key}=").as_bytes());
            content.extend_from_slice(value);
            content.push(b'\n');
        }
        self.raw(b'x', b"pax", b"", &content, Meta::default(), (0, 0))
    }

    /// The archive with its end marker.
    pub(crate) fn build(mut self) -> Vec<u8> {
        self.bytes.resize(self.bytes.len() + 1024, 0);
        self.bytes
    }
}

pub(crate) fn gzip(content: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(content).unwrap();
    encoder.finish().unwrap()
}

/// An OCI layout under construction.
pub(crate) struct Layout {
    pub path: PathBuf,
}

impl Layout {
    pub(crate) fn create(path: &Path) -> Self {
        fs::create_dir_all(path.join("blobs/sha256")).unwrap();
        fs::write(path.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        Self {
            path: path.to_owned(),
        }
    }

    /// Stores a blob, answers its descriptor.
    pub(crate) fn blob(&self, media_type: &str, content: &[u8]) -> Value {
        let digest = Digest::of(content);
        fs::write(self.path.join(digest.blob_path()), content).unwrap();
        json!({"mediaType": media_type, "digest": digest.to_string(), "size": content.len()})
    }

    /// Stores an image of `linux/ARCHITECTURE`, answers its manifest's descriptor. Layers come as
    /// stored, with their uncompressed form.
    pub(crate) fn image(&self, architecture: &str, layers: &[(Vec<u8>, Vec<u8>)]) -> Value {
        let config = config(
            architecture,
            layers.iter().map(|(_, plain)| plain.as_slice()),
        );
        let config = self.blob(
            "application/vnd.oci.image.config.v1+json",
            config.as_bytes(),
        );
        let layers: Vec<Value> = layers
            .iter()
            .map(|(stored, _)| self.blob("application/vnd.oci.image.layer.v1.tar", stored))
            .collect();
        let manifest = json!({"schemaVersion": 2, "config": config, "layers": layers});
        let manifest = manifest.to_string();
        self.blob(
            "application/vnd.oci.image.manifest.v1+json",
            manifest.as_bytes(),
        )
    }

    pub(crate) fn index(&self, manifests: &[Value]) {
        let index = json!({"schemaVersion": 2, "manifests": manifests});
        fs::write(self.path.join("index.json"), index.to_string()).unwrap();
    }

    /// A layout with one amd64 image of plain layers; its manifest digest.
    pub(crate) fn simple(path: &Path, layers: &[Vec<u8>]) -> String {
        let layout = Self::create(path);
        let layers: Vec<_> = layers.iter().map(|l| (l.clone(), l.clone())).collect();
        let manifest = layout.image("amd64", &layers);
        let digest = manifest["digest"].as_str().unwrap().to_owned();
        layout.index(&[manifest]);
        digest
    }
}

pub(crate) fn config<'l>(architecture: &str, layers: impl Iterator<Item = &'l [u8]>) -> String {
    let diff_ids: Vec<String> = layers.map(|layer| Digest::of(layer).to_string()).collect();
    json!({
        "os": "linux",
        "architecture": architecture,
        "config": {
            "Entrypoint": ["/bin/server"], "Cmd": null, "Env": ["PATH=/bin", "A=b=c"],
            "WorkingDir": "/data", "User": "redis", "StopSignal": "SIGINT", "Volumes": {"/v": {}},
        },
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    })
    .to_string()
}

/// Packs a folder's files as an archive, names relative to it.
pub(crate) fn tar_folder(folder: &Path, to: &Path) {
    let mut builder = tar::Builder::new(fs::File::create(to).unwrap());
    builder.append_dir_all(".", folder).unwrap();
    builder.into_inner().unwrap().flush().unwrap();
}

/// A docker archive of named members.
pub(crate) fn archive(to: &Path, members: &[(&str, &[u8])]) {
    let mut builder = tar::Builder::new(fs::File::create(to).unwrap());
    for (name, content) in members {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        builder
            .append_data(&mut header, name, io::Cursor::new(content))
            .unwrap();
    }
    builder.into_inner().unwrap().flush().unwrap();
}
