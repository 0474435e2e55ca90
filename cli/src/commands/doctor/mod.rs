//! `doze doctor`: whether this host can do what its configuration asks for, found by trying.
//!
//! ```text
//!   configuration ──> Subject ──> checks (files, programs, a network in a namespace of its own)
//!                                    └──> Finding { ok | warn | fail, what, how to mend }
//! ```
//!
//! A warning is something that works worse than it could; a failure keeps instances from running.
use std::path::PathBuf;

use clap::ValueEnum as _;
use doze_daemon::Config;
use serde::Serialize;

use crate::{
    failure::{Failure, GENERAL},
    output, server,
};

mod machine;
mod network;
mod storage;

/// Check whether this host can run microVMs, and how to mend what is missing
///
/// Ends with 1 when something that is needed is missing. Run it as the user the server runs as.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The server's configuration file
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
enum Level {
    Ok,
    Warn,
    Fail,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Finding {
    check: &'static str,
    level: Level,
    found: String,
    /// What to do about it; absent when nothing needs doing.
    #[serde(skip_serializing_if = "Option::is_none")]
    mend: Option<String>,
}

impl Finding {
    fn ok(check: &'static str, found: impl Into<String>) -> Self {
        Self {
            check,
            level: Level::Ok,
            found: found.into(),
            mend: None,
        }
    }
    fn warn(check: &'static str, found: impl Into<String>, mend: impl Into<String>) -> Self {
        Self {
            check,
            level: Level::Warn,
            found: found.into(),
            mend: Some(mend.into()),
        }
    }
    fn fail(check: &'static str, found: impl Into<String>, mend: impl Into<String>) -> Self {
        Self {
            check,
            level: Level::Fail,
            found: found.into(),
            mend: Some(mend.into()),
        }
    }
}

/// What of the configuration the checks look at.
#[derive(Debug, Clone)]
struct Subject {
    data_dir: PathBuf,
    /// `None`: looked up in PATH.
    qemu: Option<PathBuf>,
    kernel: PathBuf,
    modules: Option<PathBuf>,
    /// Whether instances get a network.
    network: bool,
}

impl From<&Config> for Subject {
    fn from(config: &Config) -> Self {
        Self {
            data_dir: config.data_dir.clone(),
            qemu: config.hypervisor.qemu_path.clone(),
            kernel: config.kernel.image.clone(),
            modules: config.kernel.modules.clone(),
            network: config.network.enabled,
        }
    }
}

pub async fn run(args: Args) -> Result<u8, Failure> {
    let path = args.config.or_else(server::locate);
    // Programs are run and waited for; nothing else waits for this command meanwhile.
    let findings = tokio::task::spawn_blocking(move || examine(path.as_deref()))
        .await
        .map_err(|e| Failure::new(format!("a check failed: {e}")))?;
    if args.json {
        output::json(&findings)?;
    } else {
        output::line(&render(&findings))?;
    }
    let failed = findings.iter().any(|finding| finding.level == Level::Fail);
    Ok(if failed { GENERAL } else { 0 })
}

fn examine(path: Option<&std::path::Path>) -> Vec<Finding> {
    const CHECK: &str = "configuration";
    let place = path.map_or_else(
        || "defaults (no file found)".to_owned(),
        |path| path.display().to_string(),
    );
    let mut findings = Vec::new();
    // With a broken configuration the defaults are still worth checking.
    let config = match Config::load(path) {
        Ok(config) => {
            match config.warnings().as_slice() {
                [] => findings.push(Finding::ok(CHECK, place)),
                warnings => findings.extend(warnings.iter().map(|text| {
                    Finding::warn(CHECK, text.as_str(), format!("change it in {place}"))
                })),
            }
            Some(config)
        }
        Err(errors) => {
            findings.extend(errors.0.iter().map(|error| {
                Finding::fail(
                    CHECK,
                    format!("{}: {}", error.key, error.reason),
                    format!("correct it in {place}"),
                )
            }));
            Config::parse(None, std::iter::empty()).ok()
        }
    };
    if let Some(config) = config {
        let subject = Subject::from(&config);
        findings.extend(machine::check(&subject));
        findings.extend(storage::check(&subject));
        if subject.network {
            findings.extend(network::check());
        } else {
            findings.push(Finding::ok("network", "off in the configuration"));
        }
    }
    findings
}

fn render(findings: &[Finding]) -> String {
    let mut lines = Vec::new();
    for finding in findings {
        let level = finding
            .level
            .to_possible_value()
            .map(|value| value.get_name().to_owned())
            .unwrap_or_default();
        lines.push(format!(
            "{level:<5} {:<14} {}",
            finding.check, finding.found
        ));
        if let Some(mend) = &finding.mend {
            lines.push(format!("{:<20} -> {mend}", ""));
        }
    }
    let count = |level| {
        findings
            .iter()
            .filter(|finding| finding.level == level)
            .count()
    };
    lines.push(format!(
        "{} ok, {} to know, {} to mend",
        count(Level::Ok),
        count(Level::Warn),
        count(Level::Fail)
    ));
    lines.join("\n")
}

/// Runs a program; its output, or the first line of what it complained about.
fn probe(program: &str, args: &[&str]) -> Result<String, String> {
    probe_with_input(program, args, "")
}

fn probe_with_input(program: &str, args: &[&str], input: &str) -> Result<String, String> {
    use std::{io::Write as _, process::Stdio};
    let mut child = std::process::Command::new(program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| format!("{program}: {e}"))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A program that does not read it says why on its standard error.
        let _not_read = stdin.write_all(input.as_bytes());
    }
    let output = child
        .wait_with_output()
        .map_err(|e| format!("{program}: {e}"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let complaint = String::from_utf8_lossy(&output.stderr);
    let first = complaint
        .lines()
        .map(str::trim)
        .find(|line| !line.is_empty())
        .unwrap_or("no reason given");
    Err(format!("{program}: {first}"))
}

/// An executable file of this name in PATH, or where administrative programs are.
fn find(program: &str) -> Option<PathBuf> {
    use std::os::unix::fs::PermissionsExt as _;
    let path = std::env::var_os("PATH").unwrap_or_default();
    let places = std::env::split_paths(&path).chain(["/usr/sbin", "/sbin"].map(PathBuf::from));
    places.map(|dir| dir.join(program)).find(|file| {
        file.metadata()
            .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finding_to_mend_says_how() {
        let text = render(&[
            Finding::ok("a", "fine"),
            Finding::fail("b", "gone", "apt-get install b"),
        ]);
        assert!(text.contains("fail  b              gone\n"), "{text}");
        assert!(text.contains("-> apt-get install b"), "{text}");
        assert!(text.ends_with("1 ok, 0 to know, 1 to mend"), "{text}");
    }

    #[test]
    fn programs_answer_or_complain() {
        assert_eq!(probe("sh", &["-c", "echo hi"]), Ok("hi\n".to_owned()));
        assert_eq!(
            probe("sh", &["-c", "echo first >&2; echo more >&2; exit 3"]),
            Err("sh: first".to_owned())
        );
        assert_eq!(probe_with_input("cat", &[], "in"), Ok("in".to_owned()));
        assert!(probe("doze-no-such-program", &[]).is_err());
    }

    #[test]
    fn programs_are_found_by_name() {
        assert!(find("sh").is_some());
        assert!(find("doze-no-such-program").is_none());
    }
}
