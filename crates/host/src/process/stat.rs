//! `/proc/PID/stat` (proc_pid_stat(5)): one read, so that identity and numbers belong together.
use std::{fs, io, time::Duration};

use rustix::{
    io::Errno,
    param::{clock_ticks_per_second, page_size},
};

use super::Usage;

/// The fields doze uses, in the kernel's units.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stat {
    /// Field 3. A zombie leader (`Z`) may still have running threads.
    pub(super) state: char,
    /// Fields 14 and 15, clock ticks in user and kernel mode.
    pub(super) cpu_ticks: u64,
    /// Field 22, clock ticks after boot.
    pub(super) start_ticks: u64,
    /// Field 23, bytes.
    pub(super) vms_bytes: u64,
    /// Field 24, pages.
    pub(super) rss_pages: u64,
    /// Fields 50 and 51, where the environment lies; zeros where we may not look.
    environment: (u64, u64),
}

impl Stat {
    /// Reads it; `None` when no process or thread has this number.
    pub(super) fn read(pid: i32) -> io::Result<Option<Self>> {
        let path = format!("/proc/{pid}/stat");
        match fs::read(&path) {
            // Reading an entry whose process ends between open and read gives ESRCH.
            Err(e) if is_gone(&e) => Ok(None),
            Err(e) => Err(io::Error::new(e.kind(), format!("cannot read {path}: {e}"))),
            Ok(text) => Self::parse(&text).map(Some).ok_or_else(|| {
                io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!("{path} has not the form of proc_pid_stat(5)"),
                )
            }),
        }
    }

    /// The command name in parentheses may hold any byte, parentheses and blanks included, so
    /// fields count from the last closing one.
    fn parse(text: &[u8]) -> Option<Self> {
        let end = text.iter().rposition(|b| *b == b')')?;
        let rest = std::str::from_utf8(text.get(end + 1..)?).ok()?;
        let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
        // fields[0] is field 3.
        let number = |field: usize| fields.get(field - 3)?.parse::<u64>().ok();
        let mut state = fields.first()?.chars();
        let stat = Self {
            state: state.next()?,
            cpu_ticks: number(14)?.saturating_add(number(15)?),
            start_ticks: number(22)?,
            vms_bytes: number(23)?,
            rss_pages: number(24)?,
            environment: (number(50)?, number(51)?),
        };
        state.next().is_none().then_some(stat)
    }

    /// In the middle of exec the new address space has no environment yet.
    pub(super) fn is_in_exec(&self) -> bool {
        self.vms_bytes > 0 && self.environment.1 == 0
    }

    /// Whether the process still runs what it ran at `earlier`: exec moves the environment.
    pub(super) fn runs_the_same_as(&self, earlier: &Self) -> bool {
        self.start_ticks == earlier.start_ticks && self.environment == earlier.environment
    }

    pub(super) fn usage(&self) -> Usage {
        let per_second = clock_ticks_per_second().max(1);
        let nanos = (self.cpu_ticks % per_second) * (1_000_000_000 / per_second);
        Usage {
            cpu: Duration::from_secs(self.cpu_ticks / per_second) + Duration::from_nanos(nanos),
            rss_bytes: self.rss_pages.saturating_mul(page_size() as u64),
            vms_bytes: self.vms_bytes,
        }
    }
}

/// Whether an error from below `/proc/PID` means that the process is no more.
pub(super) fn is_gone(e: &io::Error) -> bool {
    e.kind() == io::ErrorKind::NotFound || e.raw_os_error() == Some(Errno::SRCH.raw_os_error())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
    use proptest::prelude::*;

    use super::*;

    const REST: &str = "S 1 10 10 0 -1 4194560 1 2 3 4 250 50 7 8 20 0 3 0 1234 409600 25 184 \
        26 27 28 29 30 31 32 33 34 35 36 37 38 39 40 41 42 43 44 45 46 47 48 49 5000 5100 0";

    #[test]
    fn fields_are_where_the_manual_says() {
        let stat = Stat::parse(format!("10 (qemu) {REST}").as_bytes()).unwrap();
        assert_eq!(
            stat,
            Stat {
                state: 'S',
                cpu_ticks: 300,
                start_ticks: 1234,
                vms_bytes: 409_600,
                rss_pages: 25,
                environment: (5000, 5100),
            }
        );
        assert_eq!(stat.usage().rss_bytes, 25 * page_size() as u64);
        assert_eq!(
            stat.usage().cpu.as_millis() as u64,
            300 * 1000 / clock_ticks_per_second()
        );
    }

    #[test]
    fn what_is_cut_off_is_refused() {
        for text in ["", "10 (x", "10 (x)", "10 (x) S 1 2", "10 (x) SS 1"] {
            assert_eq!(Stat::parse(text.as_bytes()), None, "{text}");
        }
        assert_eq!(
            Stat::parse(format!("1 (x) {}", &REST[..50]).as_bytes()),
            None
        );
    }

    #[test]
    fn our_own_is_read() {
        let pid = i32::try_from(std::process::id()).unwrap();
        let stat = Stat::read(pid).unwrap().unwrap();
        assert!(stat.rss_pages > 0 && stat.vms_bytes > 0 && stat.start_ticks > 0);
        assert_eq!(Stat::read(i32::MAX).unwrap(), None);
    }

    proptest! {
        #[test]
        fn any_name_is_skipped(name in proptest::collection::vec(any::<u8>(), 0..64)) {
            let mut text = b"10 (".to_vec();
            text.extend(&name);
            text.extend(b") ");
            text.extend(REST.as_bytes());
            prop_assert_eq!(Stat::parse(&text).unwrap().start_ticks, 1234);
        }

        #[test]
        fn no_input_panics(text in proptest::collection::vec(any::<u8>(), 0..256)) {
            let _ = Stat::parse(&text);
        }
    }
}
