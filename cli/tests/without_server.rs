//! The command as a process, on a host where no server answers: exit status, one line on standard
//! error, nothing on standard output, no panic.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
use std::{
    io::Read as _,
    net::TcpListener,
    path::Path,
    process::{Command, Output, Stdio},
};

/// The command without anything this machine's environment could add.
fn doze(dir: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_doze"));
    command
        .args(args)
        .current_dir(dir)
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .stdin(Stdio::null());
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// An address where nothing listens.
fn nowhere() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}

/// One line that begins with `doze: `, and nothing on standard output.
fn complaint(output: &Output) -> String {
    let err = text(&output.stderr);
    assert_eq!(output.stdout, b"", "{err}");
    assert_eq!(err.lines().count(), 1, "{err}");
    assert!(err.starts_with("doze: "), "{err}");
    err
}

#[test]
fn no_server_is_one_line_that_says_how_to_start_one() {
    let dir = tempfile::tempdir().unwrap();
    let url = nowhere();
    for (args, status) in [
        (&["ps"][..], 1),
        (&["inspect", "web"], 1),
        (&["logs", "web"], 1),
        (&["stop", "web"], 1),
        (&["start", "web"], 1),
        (&["rm", "-f", "web"], 1),
        (&["wait", "web"], 1),
        (&["image", "ls"], 1),
        (&["image", "rm", "redis"], 1),
        (&["exec", "web", "true"], 125),
        (&["run", "-d", "redis"], 125),
        (&["run", "redis"], 125),
        (&["run", "-it", "redis", "sh"], 125),
    ] {
        let output = doze(dir.path(), args)
            .env("DOZE_URL", &url)
            .output()
            .unwrap();
        assert_eq!(
            output.status.code(),
            Some(status),
            "{args:?}: {}",
            text(&output.stderr)
        );
        let err = complaint(&output);
        assert!(
            err.contains(&format!("no server at {url}")) && err.contains("doze serve"),
            "{args:?}: {err}"
        );
    }
}

#[test]
fn several_names_are_each_tried() {
    let dir = tempfile::tempdir().unwrap();
    let output = doze(dir.path(), &["stop", "a", "b"])
        .env("DOZE_URL", nowhere())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(text(&output.stderr).lines().count(), 2);
}

#[test]
fn wrong_usage_ends_with_2() {
    let dir = tempfile::tempdir().unwrap();
    for args in [
        &["nap"][..],
        &["exec", "web"],
        &["run", "-d", "--rm", "x"],
        &["wait", "--state", "x", "web"],
    ] {
        let output = doze(dir.path(), args).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(!output.stderr.is_empty());
    }
}

#[test]
fn an_address_that_is_none_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let output = doze(dir.path(), &["ps", "--url", "ftp://h"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(complaint(&output).contains("ftp://h"));
}

#[test]
fn a_bad_configuration_is_told_with_all_its_mistakes() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("doze.toml");
    std::fs::write(&file, "listen = \"nowhere\"\nnap = true\n").unwrap();
    let file = file.to_str().unwrap();
    for args in [
        &["token", "--config", file][..],
        &["serve", "--config", file],
    ] {
        let output = doze(dir.path(), args).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        let err = complaint(&output);
        assert!(err.contains("listen") && err.contains("nap"), "{err}");
    }
}

#[test]
fn a_token_needs_the_servers_secret() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("doze.toml");
    let data = dir.path().join("data");
    std::fs::write(&file, format!("data_dir = {data:?}\n")).unwrap();
    let token = || {
        doze(dir.path(), &["token", "--config", file.to_str().unwrap()])
            .output()
            .unwrap()
    };
    let output = token();
    assert_eq!(output.status.code(), Some(1));
    assert!(complaint(&output).contains("jwt_secret"));
    std::fs::write(
        &file,
        format!("data_dir = {data:?}\n[auth]\njwt_secret = \"0123456789abcdef0123456789abcdef\"\n"),
    )
    .unwrap();
    let output = token();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert_eq!(text(&output.stdout).trim().split('.').count(), 3);
}

#[test]
fn the_servers_own_configuration_says_where_it_listens() {
    let dir = tempfile::tempdir().unwrap();
    let url = nowhere();
    let listen = url.strip_prefix("http://").unwrap();
    std::fs::write(
        dir.path().join("doze.toml"),
        format!("listen = {listen:?}\n"),
    )
    .unwrap();
    let output = doze(dir.path(), &["ps"])
        .env("DOZE_CONFIG", dir.path().join("doze.toml"))
        .output()
        .unwrap();
    assert!(complaint(&output).contains(&url));
}

#[test]
fn doctor_finds_what_is_missing_and_says_how_to_mend_it() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("doze.toml");
    let data = dir.path().join("data");
    std::fs::create_dir(&data).unwrap();
    let kernel = dir.path().join("no-kernel");
    std::fs::write(
        &file,
        format!("data_dir = {data:?}\n[kernel]\nimage = {kernel:?}\n[network]\nenabled = false\n"),
    )
    .unwrap();
    let output = doze(
        dir.path(),
        &["doctor", "--json", "--config", file.to_str().unwrap()],
    )
    .output()
    .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let findings: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let failed = |check: &str| {
        findings.as_array().unwrap().iter().any(|finding| {
            finding["check"] == check && finding["level"] == "fail" && finding["mend"].is_string()
        })
    };
    assert!(failed("kernel") && failed("data_dir"), "{findings}");
}

/// `doze help | head -1`: the reader leaves, and that is nobody's error.
#[test]
fn a_reader_that_leaves_causes_no_panic() {
    let dir = tempfile::tempdir().unwrap();
    let mut child = doze(dir.path(), &["doctor"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let mut err = String::new();
    child
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut err)
        .unwrap();
    assert_eq!((child.wait().unwrap().code(), err.as_str()), (Some(0), ""));
}
