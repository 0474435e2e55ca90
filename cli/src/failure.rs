//! How a command fails: an exit status and one line that says what to do next.
use std::{fmt, io};

/// Exit status for anything that went wrong and has no better one.
pub const GENERAL: u8 = 1;
/// `run` and `exec` pass the program's own exit status through; when there is none because doze
/// itself failed, they end with this one, as container tools do.
pub const NO_PROGRAM: u8 = 125;
/// 128 + SIGINT.
pub const INTERRUPTED: u8 = 130;

/// Why a command ends early. `main` prints the message as `doze: <message>` on one line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    Message {
        status: u8,
        text: String,
    },
    /// Whoever read our output is gone (`doze ps | head -1`); nobody is left to tell.
    ReaderGone,
}

impl Failure {
    pub fn new(text: impl Into<String>) -> Self {
        Failure::Message {
            status: GENERAL,
            text: text.into(),
        }
    }

    /// Same message, another exit status.
    #[must_use]
    pub fn with_status(self, status: u8) -> Self {
        match self {
            Failure::Message { text, .. } => Failure::Message { status, text },
            Failure::ReaderGone => Failure::ReaderGone,
        }
    }

    /// For `run` and `exec`: see [`NO_PROGRAM`].
    #[must_use]
    pub fn no_program(self) -> Self {
        self.with_status(NO_PROGRAM)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            // One line, whatever a server or the system put into it.
            Failure::Message { text, .. } => {
                let mut words = text.split_whitespace();
                if let Some(first) = words.next() {
                    f.write_str(first)?;
                }
                words.try_for_each(|word| write!(f, " {word}"))
            }
            Failure::ReaderGone => f.write_str("nobody reads the output"),
        }
    }
}

/// What a failed write to our own standard output means.
pub fn output(error: &io::Error) -> Failure {
    if error.kind() == io::ErrorKind::BrokenPipe {
        Failure::ReaderGone
    } else {
        Failure::new(format!("cannot write the output: {error}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_one_line() {
        assert_eq!(Failure::new("a\n  b\tc\n").to_string(), "a b c");
    }

    #[test]
    fn a_closed_pipe_is_not_an_error_to_report() {
        assert_eq!(
            output(&io::ErrorKind::BrokenPipe.into()),
            Failure::ReaderGone
        );
        assert!(matches!(
            output(&io::ErrorKind::StorageFull.into()),
            Failure::Message { status: 1, .. }
        ));
    }
}
