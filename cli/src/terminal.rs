//! The user's terminal while a command of the guest owns it.
use std::{io, os::fd::AsFd};

use rustix::termios::{self, OptionalActions, Termios};

/// Raw mode of standard input: every key goes to the guest, Ctrl-C included. The old mode comes back
/// when this is dropped, so on every way out: return, error, panic (it unwinds), or a signal that the
/// attach loop turned into a return.
#[derive(Debug)]
pub struct RawMode {
    before: Termios,
}

impl RawMode {
    pub fn enter() -> io::Result<Self> {
        let stdin = io::stdin();
        let before = termios::tcgetattr(&stdin)?;
        let mut raw = before.clone();
        raw.make_raw();
        termios::tcsetattr(&stdin, OptionalActions::Flush, &raw)?;
        Ok(Self { before })
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // Nothing can be done about a terminal that is gone, and it needs no restoring.
        let _hung_up = termios::tcsetattr(io::stdin(), OptionalActions::Drain, &self.before);
    }
}

/// Whether this is a terminal.
pub fn is_terminal(fd: impl AsFd) -> bool {
    termios::isatty(fd)
}

/// Rows and columns of the terminal on standard output (or input, when the output is redirected);
/// `None` when there is none or it does not know.
pub fn size() -> Option<(u16, u16)> {
    let known = |size: termios::Winsize| {
        (size.ws_row > 0 && size.ws_col > 0).then_some((size.ws_row, size.ws_col))
    };
    let output = termios::tcgetwinsize(io::stdout()).ok().and_then(known);
    output.or_else(|| termios::tcgetwinsize(io::stdin()).ok().and_then(known))
}
