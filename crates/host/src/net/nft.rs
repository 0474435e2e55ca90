//! Running `nft`: one text, one transaction, applied whole or not at all.
use std::{io, process::Stdio, time::Duration};

use tokio::{io::AsyncWriteExt, process::Command};

use super::{NetError, privilege};

/// The second is for users whose `PATH` has no sbin.
const PROGRAMS: [&str; 2] = ["nft", "/usr/sbin/nft"];
/// A transaction takes milliseconds; the kernel may make it wait for others.
const TIMEOUT: Duration = Duration::from_secs(30);
/// How often a transaction that met another one is tried; the pauses add up to about 5 s.
const ATTEMPTS: u32 = 10;
const FIRST_PAUSE: Duration = Duration::from_millis(5);

/// Applies the text. Cut off before its end it is applied whole or not at all.
pub(super) async fn apply(context: &str, text: &str) -> Result<(), NetError> {
    let mut pause = FIRST_PAUSE;
    let mut attempt = 1;
    loop {
        let complaint = match tokio::time::timeout(TIMEOUT, run(&PROGRAMS, text)).await {
            Ok(Ok(None)) => return Ok(()),
            Ok(Ok(Some(complaint))) => complaint,
            Ok(Err(e)) => return Err(e),
            Err(_) => format!("nft did not finish within {} s", TIMEOUT.as_secs()),
        };
        if attempt >= ATTEMPTS || !is_busy(&complaint) {
            return Err(explain(context, &complaint));
        }
        tokio::time::sleep(pause).await;
        pause *= 2;
        attempt += 1;
    }
}

/// `None` when it was applied, else what nft complained about.
async fn run(programs: &[&str], text: &str) -> Result<Option<String>, NetError> {
    let failed = |e: io::Error| NetError::Failed {
        context: "running nft".into(),
        message: e.to_string(),
    };
    for program in programs {
        let spawned = Command::new(program)
            .args(["-f", "-"])
            .env("LC_ALL", "C")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn();
        let mut child = match spawned {
            Ok(child) => child,
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            Err(e) => return Err(failed(e)),
        };
        // An nft that gives up early closes the pipe; its complaint says more than EPIPE.
        let written = match child.stdin.take() {
            Some(mut stdin) => stdin.write_all(text.as_bytes()).await,
            None => Ok(()),
        };
        let output = child.wait_with_output().await.map_err(failed)?;
        if !output.status.success() {
            let complaint = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            return Ok(Some(if complaint.is_empty() {
                format!("nft ended with {}", output.status)
            } else {
                complaint
            }));
        }
        return written.map(|()| None).map_err(failed);
    }
    Err(NetError::Missing {
        what: "the program nft is not installed".into(),
        mend: "install the package nftables".into(),
    })
}

/// Another transaction was committed meanwhile, or the kernel asks to come again.
fn is_busy(complaint: &str) -> bool {
    [
        "Device or resource busy",
        "Resource temporarily unavailable",
        "Interrupted system call",
    ]
    .iter()
    .any(|words| complaint.contains(words))
}

fn explain(context: &str, complaint: &str) -> NetError {
    if complaint.contains("Operation not permitted") {
        return privilege("change nftables rules");
    }
    let hint = if complaint.contains("Operation not supported")
        || complaint.contains("No such file or directory")
    {
        " (the kernel needs nf_tables with the families inet and bridge, nft_ct and nft_masq)"
    } else {
        ""
    };
    NetError::Failed {
        context: context.to_owned(),
        message: format!("nft refused: {complaint}{hint}"),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
    use super::*;

    #[tokio::test]
    async fn an_absent_program_is_named() {
        let error = run(&["/nonexistent/nft"], "").await.unwrap_err();
        assert!(matches!(&error, NetError::Missing { mend, .. } if mend.contains("nftables")));
    }

    #[tokio::test]
    async fn a_complaint_is_passed_on() {
        // In no namespace is this a ruleset, so nothing is applied.
        let complaint = run(&PROGRAMS, "nonsense").await.unwrap();
        assert!(complaint.unwrap().contains("syntax error"));
    }

    #[test]
    fn complaints_are_told_apart() {
        assert!(is_busy(
            "x: Error: Could not process rule: Device or resource busy\n"
        ));
        assert!(!is_busy("Error: syntax error"));
        let error = explain(
            "c",
            "netlink: Error: Operation not permitted (you must be root)",
        );
        assert!(matches!(error, NetError::Missing { .. }));
        let error = explain(
            "c",
            "Error: Could not process rule: Operation not supported",
        );
        assert!(error.to_string().contains("nft_ct"), "{error}");
    }
}
