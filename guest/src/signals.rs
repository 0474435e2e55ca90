//! Signal names, numbers and how an end is described.
use doze_agent::message::ProgramExit;

const NAMES: [(&str, i32); 31] = [
    ("HUP", libc::SIGHUP),
    ("INT", libc::SIGINT),
    ("QUIT", libc::SIGQUIT),
    ("ILL", libc::SIGILL),
    ("TRAP", libc::SIGTRAP),
    ("ABRT", libc::SIGABRT),
    ("BUS", libc::SIGBUS),
    ("FPE", libc::SIGFPE),
    ("KILL", libc::SIGKILL),
    ("USR1", libc::SIGUSR1),
    ("SEGV", libc::SIGSEGV),
    ("USR2", libc::SIGUSR2),
    ("PIPE", libc::SIGPIPE),
    ("ALRM", libc::SIGALRM),
    ("TERM", libc::SIGTERM),
    ("STKFLT", libc::SIGSTKFLT),
    ("CHLD", libc::SIGCHLD),
    ("CONT", libc::SIGCONT),
    ("STOP", libc::SIGSTOP),
    ("TSTP", libc::SIGTSTP),
    ("TTIN", libc::SIGTTIN),
    ("TTOU", libc::SIGTTOU),
    ("URG", libc::SIGURG),
    ("XCPU", libc::SIGXCPU),
    ("XFSZ", libc::SIGXFSZ),
    ("VTALRM", libc::SIGVTALRM),
    ("PROF", libc::SIGPROF),
    ("WINCH", libc::SIGWINCH),
    ("IO", libc::SIGIO),
    ("PWR", libc::SIGPWR),
    ("SYS", libc::SIGSYS),
];
/// What programs see: the C library keeps the kernel's first two for itself.
const RTMIN: i32 = 34;
const RTMAX: i32 = 64;

/// `SIGTERM`, `TERM`, `15`, `SIGRTMIN+3`, in any case.
pub fn parse(text: &str) -> Option<i32> {
    let upper = text.trim().to_ascii_uppercase();
    if let Ok(number) = upper.parse() {
        return (1..=RTMAX).contains(&number).then_some(number);
    }
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some((_, number)) = NAMES.iter().find(|(n, _)| *n == name) {
        return Some(*number);
    }
    let offset = |rest: &str, sign: char| match rest {
        "" => Some(0),
        rest => rest.strip_prefix(sign)?.parse::<i32>().ok(),
    };
    let number = match (name.strip_prefix("RTMIN"), name.strip_prefix("RTMAX")) {
        (Some(rest), _) => RTMIN.checked_add(offset(rest, '+')?)?,
        (_, Some(rest)) => RTMAX.checked_sub(offset(rest, '-')?)?,
        _ => return None,
    };
    (RTMIN..=RTMAX).contains(&number).then_some(number)
}

/// `SIGKILL` of 9, `SIGRTMIN+3` of 37.
pub fn name(number: i32) -> String {
    match NAMES.iter().find(|(_, n)| *n == number) {
        Some((name, _)) => format!("SIG{name}"),
        None if number >= RTMIN => format!("SIGRTMIN+{}", number - RTMIN),
        None => format!("SIG{number}"),
    }
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    Exited(i32),
    Signaled(i32),
}

impl Ended {
    /// In the words of [`ProgramExit`].
    pub fn describe(self) -> ProgramExit {
        match self {
            Self::Exited(0) => ProgramExit {
                code: 0,
                message: String::new(),
            },
            Self::Exited(code) => ProgramExit {
                code,
                message: format!("exited with code {code}"),
            },
            Self::Signaled(signal) => ProgramExit {
                code: 128 + signal,
                message: format!("killed by signal {signal} ({})", name(signal)),
            },
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_agree() {
        for (name_, number) in NAMES {
            assert_eq!(parse(name_), Some(number));
            assert_eq!(parse(&name(number)), Some(number));
        }
        assert_eq!(parse("sigterm"), Some(15));
        assert_eq!(parse("9"), Some(9));
        assert_eq!(parse("SIGRTMIN+3"), Some(37));
        assert_eq!(parse("RTMAX-1"), Some(63));
        assert_eq!(parse("SIGRTMIN"), Some(34));
        assert_eq!(name(37), "SIGRTMIN+3");
        for bad in [
            "",
            "0",
            "65",
            "-1",
            "SIGFOO",
            "RTMIN+31",
            "RTMIN-1",
            "RTMIN+x",
            "RTMAX-99999999999",
        ] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn ends_are_described_as_documented() {
        let text = |e: Ended| (e.describe().code, e.describe().message);
        assert_eq!(text(Ended::Exited(0)), (0, String::new()));
        assert_eq!(text(Ended::Exited(3)), (3, "exited with code 3".into()));
        assert_eq!(
            text(Ended::Signaled(9)),
            (137, "killed by signal 9 (SIGKILL)".into())
        );
    }
}
