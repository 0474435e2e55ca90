//! Puts the guest's program (static init and agent) beside this crate, so that `include_bytes!`
//! finds it and the server is one file.
//!
//! The guest is built by a cargo of its own: another profile (smallest size), another kind of
//! linking (static), so another target folder. `DOZE_GUEST_BIN=/path` uses a ready one instead.
use std::{
    env,
    error::Error,
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

fn main() -> Result<(), Box<dyn Error>> {
    let manifest_dir = PathBuf::from(var("CARGO_MANIFEST_DIR")?);
    let workspace = manifest_dir
        .parent()
        .ok_or("the manifest folder has no parent")?;
    println!("cargo::rerun-if-env-changed=DOZE_GUEST_BIN");
    let guest = match env::var_os("DOZE_GUEST_BIN").filter(|path| !path.is_empty()) {
        Some(path) => {
            let path = PathBuf::from(path);
            println!("cargo::rerun-if-changed={}", path.display());
            path
        }
        None => build(workspace)?,
    };
    let target = PathBuf::from(var("OUT_DIR")?).join("doze-guest");
    fs::copy(&guest, &target)
        .map_err(|error| format!("copy the guest program {}: {error}", guest.display()))?;
    Ok(())
}

fn build(workspace: &Path) -> Result<PathBuf, Box<dyn Error>> {
    for input in [
        "Cargo.toml",
        "Cargo.lock",
        "guest/Cargo.toml",
        "guest/src",
        "crates/agent/Cargo.toml",
        "crates/agent/src",
    ] {
        println!(
            "cargo::rerun-if-changed={}",
            workspace.join(input).display()
        );
    }
    println!("cargo::rerun-if-env-changed=CARGO_TARGET_DIR");
    // Named explicitly: otherwise the static linking would apply to build scripts and macros too.
    let target = format!("{}-unknown-linux-gnu", var("CARGO_CFG_TARGET_ARCH")?);
    let target_dir = match env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => workspace.join(dir),
        None => workspace.join("target"),
    }
    .join("guest");

    let mut cargo = Command::new(var("CARGO")?);
    cargo
        .current_dir(workspace)
        .args(["build", "--package", "doze-guest", "--profile", "guest"])
        .args(["--target", &target, "--target-dir"])
        .arg(&target_dir);
    for (name, _) in env::vars_os().filter(|(name, _)| leaks(name)) {
        cargo.env_remove(name);
    }
    cargo.env("RUSTFLAGS", "-C target-feature=+crt-static");
    let status = cargo
        .status()
        .map_err(|error| format!("start cargo for the guest program: {error}"))?;
    if !status.success() {
        return Err(format!("building the guest program failed: {status}").into());
    }
    Ok(target_dir.join(target).join("guest").join("doze-guest"))
}

/// What the outer cargo tells this build script must not reach the inner one: flags of another
/// profile, clippy's driver, this package's name and features. What belongs to the machine
/// (registries, proxies, the job server) stays.
fn leaks(name: &OsStr) -> bool {
    let Some(name) = name.to_str() else {
        return false;
    };
    const OURS: [&str; 4] = [
        "CARGO_MAKEFLAGS",
        "CARGO_HOME",
        "CARGO_INCREMENTAL",
        "CARGO",
    ];
    const MACHINE: [&str; 6] = [
        "CARGO_NET_",
        "CARGO_HTTP_",
        "CARGO_REGISTRIES_",
        "CARGO_REGISTRY_",
        "CARGO_SOURCE_",
        "CARGO_TERM_",
    ];
    const BUILD: [&str; 14] = [
        "RUSTC",
        "RUSTDOC",
        "RUSTFLAGS",
        "RUSTDOCFLAGS",
        "RUSTC_WORKSPACE_WRAPPER",
        "RUSTC_LINKER",
        "CLIPPY_ARGS",
        "TARGET",
        "HOST",
        "OUT_DIR",
        "OPT_LEVEL",
        "PROFILE",
        "DEBUG",
        "NUM_JOBS",
    ];
    let of_cargo = name.starts_with("CARGO_")
        && !OURS.contains(&name)
        && !MACHINE.iter().any(|prefix| name.starts_with(prefix));
    of_cargo || BUILD.contains(&name) || name.starts_with("DEP_")
}

fn var(name: &str) -> Result<String, Box<dyn Error>> {
    env::var(name).map_err(|error| format!("{name}: {error}").into())
}
