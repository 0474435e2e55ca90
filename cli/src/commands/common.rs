//! What several verbs share: `KEY=VALUE` arguments, several names at once, waiting for a boot.
use std::collections::BTreeMap;

use doze_api::{Instance, InstanceState};

use crate::{
    connection::Server,
    failure::{Failure, GENERAL},
    output,
};

/// Parses `KEY=VALUE`.
pub fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        Some(_) => Err("the key before '=' is empty".to_owned()),
        None => Err("expected KEY=VALUE".to_owned()),
    }
}

/// `KEY=VALUE`, or `KEY` alone for the value it has here.
pub fn env_pair(text: &str) -> Result<(String, String), String> {
    if text.contains('=') {
        return pair(text);
    }
    match std::env::var(text) {
        Ok(value) => Ok((text.to_owned(), value)),
        Err(_) => Err(format!(
            "expected KEY=VALUE ({text} is not set here, so it has no value to pass on)"
        )),
    }
}

/// The last of two equal keys wins.
pub fn map(pairs: Vec<(String, String)>) -> BTreeMap<String, String> {
    pairs.into_iter().collect()
}

/// Does `act` for every name; one that fails is reported and does not keep the rest from it.
pub async fn for_each(
    names: &[String],
    mut act: impl AsyncFnMut(&str) -> Result<(), Failure>,
) -> Result<u8, Failure> {
    let mut status = 0;
    for name in names {
        match act(name).await {
            Ok(()) => {}
            Err(Failure::ReaderGone) => return Err(Failure::ReaderGone),
            Err(failure) if names.len() == 1 => return Err(failure),
            Err(failure) => {
                output::remark(&failure.to_string());
                status = GENERAL;
            }
        }
    }
    Ok(status)
}

/// Waits until a booting instance runs, or no longer will. The server gives a boot up in its own
/// time, so there is no limit here.
pub async fn settled(server: &Server, id: &str) -> Result<Instance, Failure> {
    loop {
        let outcome = server
            .client
            .wait_instance(id, InstanceState::Running, Some("1m"))
            .await
            .map_err(|e| server.explain(&e))?;
        if outcome.timed_out
            && matches!(
                outcome.state,
                InstanceState::Created | InstanceState::Initializing
            )
        {
            continue;
        }
        return server
            .client
            .get_instance(id)
            .await
            .map_err(|e| server.explain(&e));
    }
}

/// `Ok` when it runs, or ran and ended by itself; else why it does not.
pub fn started(instance: &Instance) -> Result<(), Failure> {
    if instance.state == InstanceState::Running {
        return Ok(());
    }
    if let Some(code) = instance.exit_code {
        return match code {
            126 | 127 => {
                Err(
                    Failure::new(format!("{}: {}", instance.name, ending(instance, code)))
                        .with_status(u8::try_from(code).unwrap_or(GENERAL)),
                )
            }
            _ => {
                output::remark(&format!("{}: {}", instance.name, ending(instance, code)));
                Ok(())
            }
        };
    }
    Err(Failure::new(format!(
        "{} is {} instead of Running{}; `doze logs --source vmm {}` shows its boot",
        instance.name,
        instance.state,
        why(instance),
        instance.name
    )))
}

/// Waits for what boots, unless told not to. A restored guest that has not answered yet is not waited for: it may
/// never answer, and it is there.
pub async fn brought_up(
    server: &Server,
    instance: Instance,
    no_wait: bool,
) -> Result<Instance, Failure> {
    let coming = matches!(
        instance.state,
        InstanceState::Created | InstanceState::Initializing
    );
    if !coming || (no_wait && instance.failure.is_none()) {
        return Ok(instance);
    }
    if let Some(why) = &instance.failure {
        output::remark(&format!("{}: {why}", instance.name));
        return Ok(instance);
    }
    let instance = settled(server, &instance.id).await?;
    started(&instance)?;
    Ok(instance)
}

/// Prints what came of a command that makes or changes one instance.
pub fn made(instance: &Instance, json: bool) -> Result<u8, Failure> {
    match json {
        true => output::json(instance)?,
        false => output::line(&instance.name)?,
    }
    Ok(0)
}

/// How a program ended, in words.
pub fn ending(instance: &Instance, code: i32) -> String {
    match instance.exit_message.as_deref() {
        Some(message) if !message.is_empty() => message.to_owned(),
        _ => format!("exited with code {code}"),
    }
}

/// `: reason`, or nothing.
pub fn why(instance: &Instance) -> String {
    let reason = instance
        .failure
        .as_deref()
        .or(instance.state_error.as_deref());
    reason
        .map(|reason| format!(" ({reason})"))
        .unwrap_or_default()
}

/// The first twelve characters, enough to be unique and short enough for a table.
pub fn short_id(id: &str) -> &str {
    id.get(..12).unwrap_or(id)
}

/// A Go duration without what is below a second.
pub fn whole_seconds(duration: &str) -> String {
    if ["ms", "\u{b5}s", "ns"]
        .iter()
        .any(|unit| duration.ends_with(unit))
    {
        return "0s".to_owned();
    }
    match duration.split_once('.') {
        Some((whole, _)) => format!("{whole}s"),
        None => duration.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
    use super::*;

    #[test]
    fn pairs() {
        assert_eq!(pair("A=b=c").unwrap(), ("A".to_owned(), "b=c".to_owned()));
        assert_eq!(pair("A=").unwrap(), ("A".to_owned(), String::new()));
        assert!(pair("=b").is_err());
        assert!(pair("A").is_err());
    }

    #[test]
    fn a_bare_key_takes_the_value_of_this_environment() {
        assert_eq!(env_pair("CARGO_PKG_NAME").unwrap().1, "doze");
        assert!(
            env_pair("DOZE_TEST_NEVER_SET")
                .unwrap_err()
                .contains("DOZE_TEST_NEVER_SET")
        );
        assert_eq!(env_pair("X=1").unwrap(), ("X".to_owned(), "1".to_owned()));
    }

    #[test]
    fn short_ids() {
        assert_eq!(short_id("abcdefghijklmnop"), "abcdefghijkl");
        assert_eq!(short_id("abc"), "abc");
    }
}
