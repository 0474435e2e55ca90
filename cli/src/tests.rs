//! The command line as a whole.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
use clap::Parser as _;

use super::*;

fn parse(words: &[&str]) -> Result<Cli, clap::Error> {
    Cli::try_parse_from(std::iter::once(&"doze").chain(words))
}

#[test]
fn the_definition_is_consistent() {
    command_line().debug_assert();
}

#[test]
fn every_verb_is_there() {
    let verbs: Vec<_> = command_line()
        .get_subcommands()
        .map(|c| c.get_name().to_owned())
        .collect();
    for verb in [
        "serve",
        "run",
        "ps",
        "exec",
        "logs",
        "stop",
        "start",
        "rm",
        "inspect",
        "wait",
        "image",
        "token",
        "doctor",
        "fork",
        "snapshot",
        "snapshot-tool",
        "schedule",
        "auto-standby",
    ] {
        assert!(verbs.iter().any(|v| v == verb), "{verb} is missing");
    }
}

#[test]
fn a_commands_own_options_are_not_ours() {
    for words in [
        &["exec", "web", "ls", "-l", "--json"][..],
        &["exec", "web", "--", "ls", "-l"],
        &["exec", "-it", "web", "sh"],
        &["run", "redis", "redis-server", "--port", "1"],
        &["run", "-d", "redis", "--port", "1"],
    ] {
        parse(words).unwrap_or_else(|e| panic!("{words:?}: {e}"));
    }
}

#[test]
fn wrong_usage_is_refused() {
    for words in [
        &[][..],
        &["nap"],
        &["exec", "web"],
        &["rm"],
        &["stop"],
        &["wait", "--state", "Asleep", "web"],
        &["logs", "--tail", "-1", "web"],
        &["logs", "--source", "dmesg", "web"],
        &["run", "--env", "=x", "redis"],
        &["run", "--hypervisor", "xen", "redis"],
        &["ps", "--tag", "team"],
        &["ps", "--json", "--quiet"],
        &["image", "import", "redis"],
        &["fork", "web"],
        &["fork", "web", "new", "--target-state", "Paused"],
        &["snapshot"],
        &["snapshot", "create"],
        &["snapshot", "create", "web", "--kind", "Running"],
        &["snapshot", "ls", "--json", "--quiet"],
        &["snapshot", "restore", "web"],
        &["snapshot", "fork", "before"],
        &["snapshot", "rm"],
        &["snapshot", "export"],
        &["snapshot", "import", "--name", "a"],
        &["schedule", "set", "web", "--every", "1h"],
        &["schedule", "set", "web", "--keep", "3"],
        &["schedule", "set", "web", "--every", "1h", "--keep", "-1"],
        &["auto-standby", "set", "web"],
        &[
            "auto-standby",
            "set",
            "--off",
            "--idle-timeout",
            "5m",
            "web",
        ],
        &[
            "auto-standby",
            "set",
            "--idle-timeout",
            "5m",
            "--ignore-port",
            "0",
            "web",
        ],
    ] {
        assert!(parse(words).is_err(), "{words:?}");
    }
}

#[test]
fn moments_are_kept_in_the_words_of_the_contract() {
    for words in [
        &["fork", "web", "new", "--from-running", "--json"][..],
        &["fork", "--target-state", "Standby", "web", "new"],
        &[
            "snapshot", "create", "web", "--name", "before", "--tag", "a=b",
        ],
        &[
            "snapshot",
            "restore",
            "web",
            "before",
            "--target-state",
            "Stopped",
            "--hypervisor",
            "qemu",
        ],
        &["snapshot", "ls", "web", "--kind", "Stopped"],
        &[
            "schedule",
            "set",
            "web",
            "--every",
            "1h",
            "--keep",
            "3",
            "--max-age",
            "24h",
        ],
        &[
            "schedule",
            "set",
            "web",
            "--every",
            "1h",
            "--max-age",
            "24h",
            "--prefix",
            "p",
        ],
    ] {
        parse(words).unwrap_or_else(|e| panic!("{words:?}: {e}"));
    }
}

#[test]
fn the_word_that_is_wrong_comes_with_the_right_ones() {
    let text = parse(&["wait", "--state", "Asleep", "web"])
        .unwrap_err()
        .to_string();
    assert!(
        text.contains("Running") && text.contains("Standby"),
        "{text}"
    );
}

#[test]
fn the_address_may_stand_anywhere() {
    let cli = parse(&["ps", "--url", "http://h:1"]).unwrap();
    assert_eq!(cli.connection.url.as_deref(), Some("http://h:1"));
}
