//! Writes an OCI layout (image-spec image-layout.md), whole or not at all.
use std::{
    fs, io,
    io::Write,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::{packages, tree::Tree};

/// In `index.json`: the hash of everything the image was made from.
const INPUTS: &str = "dev.doze.demo-image.inputs";
const NAME: &str = "demo";

/// The inputs of a layout that is there and complete.
pub fn inputs(out: &Path) -> Result<Option<String>> {
    let path = out.join("index.json");
    let index: Value = match fs::read(&path) {
        Ok(text) => {
            serde_json::from_slice(&text).with_context(|| format!("read {}", path.display()))?
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e).with_context(|| format!("read {}", path.display())),
    };
    let inputs = index.get("annotations").and_then(|a| a.get(INPUTS));
    let manifest = index.pointer("/manifests/0");
    let complete = manifest.is_some_and(|manifest| has_blobs(out, manifest));
    Ok(inputs
        .and_then(Value::as_str)
        .filter(|_| complete)
        .map(str::to_owned))
}

/// Whether the manifest and all it names are there, by their sizes.
fn has_blobs(out: &Path, manifest: &Value) -> bool {
    let path = |descriptor: &Value| {
        let digest = descriptor.get("digest")?.as_str()?;
        Some(out.join("blobs").join(digest.replace(':', "/")))
    };
    let is_there = |descriptor: &Value| {
        let size = path(descriptor).and_then(|path| Some(fs::metadata(path).ok()?.len()));
        size.is_some() && size == descriptor.get("size").and_then(Value::as_u64)
    };
    let content = path(manifest).and_then(|path| fs::read(path).ok());
    let content = content.and_then(|text| serde_json::from_slice::<Value>(&text).ok());
    let Some(content) = content.filter(|_| is_there(manifest)) else {
        return false;
    };
    let layers = content.get("layers").and_then(Value::as_array);
    let mut named = content
        .get("config")
        .into_iter()
        .chain(layers.into_iter().flatten());
    layers.is_some() && named.all(is_there)
}

/// Builds beside `out` and renames, so that a layout that is there is complete.
pub fn write(out: &Path, layers: &[Tree], architecture: &str, inputs: &str) -> Result<String> {
    let name = out
        .file_name()
        .context("--out needs a name")?
        .to_string_lossy();
    let stage = out.with_file_name(format!(".{name}.{}", std::process::id()));
    packages::remove(&stage)?;
    let staged = write_to(&stage, layers, architecture, inputs);
    let report = match staged {
        Ok(report) => report,
        Err(e) => {
            packages::remove(&stage).with_context(|| format!("after: {e:#}"))?;
            return Err(e);
        }
    };
    packages::remove(out)?;
    fs::rename(&stage, out).with_context(|| format!("rename to {}", out.display()))?;
    Ok(format!("{} has {report}", out.display()))
}

fn write_to(folder: &Path, layers: &[Tree], architecture: &str, inputs: &str) -> Result<String> {
    let blobs = folder.join("blobs/sha256");
    fs::create_dir_all(&blobs).with_context(|| format!("create {}", blobs.display()))?;
    let store = Blobs(blobs);
    let mut descriptors = Vec::new();
    let mut diff_ids = Vec::new();
    let mut total = 0;
    for layer in layers {
        let tar = layer.to_tar()?;
        diff_ids.push(digest(&tar));
        let compressed = gzip(&tar)?;
        total += compressed.len();
        descriptors.push(store.put("application/vnd.oci.image.layer.v1.tar+gzip", &compressed)?);
    }
    let config = store.put_json(
        "application/vnd.oci.image.config.v1+json",
        &config(architecture, &diff_ids),
    )?;
    let mut manifest = store.put_json(
        "application/vnd.oci.image.manifest.v1+json",
        &json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": config,
            "layers": descriptors,
        }),
    )?;
    let digest = manifest.get("digest").cloned().unwrap_or_default();
    if let Some(descriptor) = manifest.as_object_mut() {
        let platform = json!({"os": "linux", "architecture": architecture});
        descriptor.insert("platform".into(), platform);
        let names = json!({"org.opencontainers.image.ref.name": NAME});
        descriptor.insert("annotations".into(), names);
    }
    write_file(
        &folder.join("oci-layout"),
        br#"{"imageLayoutVersion":"1.0.0"}"#,
    )?;
    let index = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [manifest],
        "annotations": {INPUTS: inputs},
    });
    write_file(&folder.join("index.json"), index.to_string().as_bytes())?;
    let digest = digest.as_str().unwrap_or_default();
    Ok(format!(
        "{} layers of {} KiB, digest {digest}",
        layers.len(),
        total / 1024
    ))
}

fn config(architecture: &str, diff_ids: &[String]) -> Value {
    json!({
        "os": "linux",
        "architecture": architecture,
        "config": {
            "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
            "Entrypoint": ["/usr/bin/redis-server"],
            // Every write is in the append-only file; snapshots would only add noise.
            "Cmd": ["--bind", "0.0.0.0", "--protected-mode", "no", "--dir", "/data",
                    "--save", "", "--appendonly", "yes"],
            "WorkingDir": "/data",
            "User": "redis",
            "ExposedPorts": {"6379/tcp": {}},
            "StopSignal": "SIGTERM",
        },
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    })
}

struct Blobs(PathBuf);

impl Blobs {
    fn put(&self, media_type: &str, content: &[u8]) -> Result<Value> {
        let digest = digest(content);
        let name = digest.strip_prefix("sha256:").unwrap_or(&digest);
        write_file(&self.0.join(name), content)?;
        Ok(json!({"mediaType": media_type, "digest": digest, "size": content.len()}))
    }

    /// serde_json keeps the order of keys stable, which the digest depends on.
    fn put_json(&self, media_type: &str, value: &Value) -> Result<Value> {
        self.put(media_type, value.to_string().as_bytes())
    }
}

fn digest(content: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(content)))
}

/// Without name and time in its header, so the same content gives the same bytes.
fn gzip(content: &[u8]) -> Result<Vec<u8>> {
    let mut encoder = flate2::GzBuilder::new()
        .mtime(0)
        .write(Vec::new(), flate2::Compression::default());
    encoder.write_all(content)?;
    Ok(encoder.finish()?)
}

fn write_file(path: &Path, content: &[u8]) -> Result<()> {
    fs::write(path, content).with_context(|| format!("write {}", path.display()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn the_same_tree_gives_the_same_layout() {
        let mut tree = Tree::default();
        tree.file("etc/hosts", 0o644, *b"localhost");
        let base = std::env::temp_dir().join(format!("doze-layout-test-{}", std::process::id()));
        fs::create_dir_all(&base).unwrap();
        let mut seen = Vec::new();
        for name in ["one", "two"] {
            let out = base.join(name);
            write(&out, std::slice::from_ref(&tree), "amd64", "abc").unwrap();
            assert_eq!(inputs(&out).unwrap().as_deref(), Some("abc"));
            seen.push(fs::read(out.join("index.json")).unwrap());
        }
        assert_eq!(inputs(&base.join("three")).unwrap(), None);
        assert_eq!(seen[0], seen[1]);
        let blobs = fs::read_dir(base.join("two/blobs/sha256")).unwrap();
        for blob in blobs {
            let blob = blob.unwrap().path();
            let content = fs::read(&blob).unwrap();
            fs::write(&blob, b"short").unwrap();
            assert_eq!(
                inputs(&base.join("two")).unwrap(),
                None,
                "{}",
                blob.display()
            );
            fs::write(&blob, content).unwrap();
        }
        let stages = fs::read_dir(&base).unwrap().count();
        assert_eq!(stages, 2, "a stage folder stayed");
        fs::remove_dir_all(&base).unwrap();
    }
}
