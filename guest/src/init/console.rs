//! What init says on the serial console.
use std::{
    fs,
    sync::atomic::{AtomicBool, Ordering},
    time::Instant,
};

use doze_agent::{config::EXIT_MARKER, message::ProgramExit};
use rustix::{
    fs::{Mode, OFlags},
    stdio::{dup2_stderr, dup2_stdin, dup2_stdout},
};

/// Word on the kernel's command line that makes init tell what it does when.
const DEBUG_WORD: &str = "doze.debug";
static DEBUG: AtomicBool = AtomicBool::new(false);

/// Points the standard streams somewhere; /dev must be there.
pub(super) fn open() {
    if let Ok(null) = rustix::fs::open("/dev/null", OFlags::RDWR, Mode::empty()) {
        dup2_stdin(&null).ok();
    }
    // Without a console there is nobody to complain to, and nothing that needs one.
    if let Ok(console) =
        rustix::fs::open("/dev/console", OFlags::RDWR | OFlags::NOCTTY, Mode::empty())
    {
        dup2_stdout(&console).ok();
        dup2_stderr(&console).ok();
    }
}

/// Reads the kernel's command line; /proc must be there.
pub(super) fn read_debug_flag() {
    let cmdline = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    DEBUG.store(
        cmdline.split_whitespace().any(|w| w == DEBUG_WORD),
        Ordering::Relaxed,
    );
}

/// A line for the operator.
pub(super) fn say(text: impl std::fmt::Display) {
    // eprintln! would panic if the console vanished.
    use std::io::Write;
    writeln!(std::io::stderr(), "doze-init: {text}").ok();
}

/// A line with the time since boot, when asked for by `doze.debug`.
pub(super) fn debug(text: impl std::fmt::Display) {
    if DEBUG.load(Ordering::Relaxed) {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        say(format_args!(
            "[{}.{:03}] {text}",
            now.tv_sec,
            now.tv_nsec / 1_000_000
        ));
    }
}

/// Tells how long something took, when asked for.
pub(super) fn timed<T>(what: impl std::fmt::Display, work: impl FnOnce() -> T) -> T {
    let begin = Instant::now();
    let done = work();
    debug(format_args!("{what}: {} us", begin.elapsed().as_micros()));
    done
}

/// The line a server reads when the control channel did not bring the news.
pub(super) fn exit_marker(exit: &ProgramExit) {
    use std::io::Write;
    let json = serde_json::to_string(exit).unwrap_or_default();
    writeln!(std::io::stderr(), "\n{EXIT_MARKER}{json}").ok();
}
