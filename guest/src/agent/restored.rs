//! What a guest needs after its memory came out of a snapshot.
//!
//! Its wall clock stands where it stood at the standby, and its random numbers come from a state that may be
//! on disk twice. (CLOCK_MONOTONIC stood still and goes on; it is not touched.)
//!
//! ```text
//!   Restored {wall_us, entropy, identity} + time waited
//!       ──checked──> Kernel: set the clock, mix in, reseed, take the identity
//!                       └── what failed ──> RestoredDone {problem, identity_applied}
//! ```
//!
//! Entropy first, identity last: whoever is woken by a new address finds fresh random numbers. Until the identity is
//! taken, the programs of a copy see names and addresses of the guest it was copied from; what they send gets
//! nowhere, because the host does not let the copy near the network before its answer.
//!
//! Every step is tried, whatever became of the ones before it: a guest with fresh entropy and a late clock
//! is better than one with neither.
use std::{io, os::fd::OwnedFd, time::Duration};

use doze_agent::message::{ENTROPY_BYTES, Identity};
use rustix::{
    fs::{FileType, Mode, OFlags, fstat, makedev, open},
    time::{ClockId, Timespec, clock_settime},
};

use crate::{init::identity::Me, sys};

/// What of the running machine a restore mends. A test must never set the clock of the machine it runs on.
pub trait Kernel {
    /// Sets CLOCK_REALTIME to this long after 1970-01-01 UTC.
    fn set_realtime(&self, since_1970: Duration) -> io::Result<()>;
    /// Mixes these bytes into the entropy pool and counts their bits.
    fn add_entropy(&self, bytes: &[u8]) -> io::Result<()>;
    /// Has the random number generator take what is in the pool at once.
    fn reseed(&self) -> io::Result<()>;
    /// Makes the machine somebody else, and returns its former host name; what failed, in words.
    fn take_identity(&self, identity: &Identity) -> Result<String, String>;
}

/// The kernel this program is the init of, and who it is if it booted.
#[derive(Debug)]
pub struct ThisKernel(pub Option<Me>);

impl Kernel for ThisKernel {
    fn set_realtime(&self, since_1970: Duration) -> io::Result<()> {
        only_as_init()?;
        let tv_sec = i64::try_from(since_1970.as_secs()).map_err(io::Error::other)?;
        let time = Timespec {
            tv_sec,
            tv_nsec: since_1970.subsec_nanos().into(),
        };
        Ok(clock_settime(ClockId::Realtime, time)?)
    }

    fn add_entropy(&self, bytes: &[u8]) -> io::Result<()> {
        only_as_init()?;
        sys::add_entropy(&random_device()?, bytes)
    }

    fn reseed(&self) -> io::Result<()> {
        only_as_init()?;
        sys::reseed(&random_device()?)
    }

    fn take_identity(&self, identity: &Identity) -> Result<String, String> {
        only_as_init().map_err(|e| e.to_string())?;
        let me = self.0.as_ref();
        me.ok_or("this guest did not come up")?.take(identity)
    }
}

/// The machine whose clock this sets is a virtual one of its own, or it is not this program's to set.
fn only_as_init() -> io::Result<()> {
    if std::process::id() == 1 {
        return Ok(());
    }
    Err(io::Error::new(
        io::ErrorKind::PermissionDenied,
        "not the init of this machine",
    ))
}

/// Whatever else the program in this guest put there is left alone, and cannot make us wait.
fn random_device() -> io::Result<OwnedFd> {
    const PATH: &str = "/dev/urandom";
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let device = open(PATH, flags, Mode::empty())?;
    let is = fstat(&device)?;
    // Source: Linux Documentation/admin-guide/devices.txt.
    if FileType::from_raw_mode(is.st_mode) != FileType::CharacterDevice
        || is.st_rdev != makedev(1, 9)
    {
        return Err(io::Error::other(format!(
            "{PATH} is not the kernel's random number generator"
        )));
    }
    Ok(device)
}

/// What became of the host's request.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Outcome {
    /// What failed, for the host to read.
    pub(super) problem: Option<String>,
    /// Of a machine that took another identity.
    pub(super) former_hostname: Option<String>,
    /// It took another identity, and its random numbers are its own.
    pub(super) is_itself: bool,
}

/// Does what the host asked.
pub(super) fn mend(
    kernel: &dyn Kernel,
    wall_us: i64,
    waited: Duration,
    entropy: &str,
    identity: Option<&Identity>,
) -> Outcome {
    let set = wall_clock(wall_us, waited).and_then(|now| {
        kernel
            .set_realtime(now)
            .map_err(|e| format!("the clock was not set: {e}"))
    });
    let mixed = decoded(entropy).and_then(|bytes| {
        kernel
            .add_entropy(&bytes)
            .map_err(|e| format!("entropy was not mixed in: {e}"))
    });
    let reseeded = kernel
        .reseed()
        .map_err(|e| format!("the random number generator was not reseeded: {e}"));
    let (former_hostname, taken) = match identity.map(|i| kernel.take_identity(i)) {
        Some(Ok(former)) => (Some(former), Ok(())),
        Some(Err(e)) => (None, Err(format!("the identity was not taken: {e}"))),
        None => (None, Ok(())),
    };
    // A name of its own beside the random numbers of another one would not tell them apart.
    let is_itself = former_hostname.is_some() && mixed.is_ok() && reseeded.is_ok();
    let failed: Vec<_> = [set, mixed, reseeded, taken]
        .into_iter()
        .filter_map(Result::err)
        .collect();
    Outcome {
        problem: (!failed.is_empty()).then(|| failed.join("; ")),
        former_hostname,
        is_itself,
    }
}

/// The time now: what it was when the message was made, and how long that is ago.
fn wall_clock(wall_us: i64, waited: Duration) -> Result<Duration, String> {
    let made = u64::try_from(wall_us)
        .ok()
        .filter(|us| *us > 0)
        .ok_or_else(|| {
            format!("the clock was not set: wall_us {wall_us} is not a time after 1970")
        })?;
    Duration::from_micros(made)
        .checked_add(waited)
        .ok_or_else(|| {
            format!(
                "the clock was not set: wall_us {wall_us} and {waited:?} of waiting are no time"
            )
        })
}

fn decoded(entropy: &str) -> Result<Vec<u8>, String> {
    let bytes = hex::decode(entropy)
        .map_err(|e| format!("entropy was not mixed in: it is not hexadecimal: {e}"))?;
    if ENTROPY_BYTES.contains(&bytes.len()) {
        return Ok(bytes);
    }
    Err(format!(
        "entropy was not mixed in: it has {} bytes; {} to {} are allowed",
        bytes.len(),
        ENTROPY_BYTES.start(),
        ENTROPY_BYTES.end()
    ))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
mod tests {
    use std::cell::RefCell;

    use super::*;

    const WALL_US: i64 = 1_700_000_000_250_000;

    #[derive(Default)]
    struct Fake {
        clock: RefCell<Option<Duration>>,
        entropy: RefCell<Vec<u8>>,
        reseeded_with: RefCell<Option<Vec<u8>>>,
        identity: RefCell<Option<(Identity, bool)>>,
        broken: bool,
    }

    impl Fake {
        fn done<T>(&self, value: T) -> io::Result<T> {
            match self.broken {
                true => Err(io::ErrorKind::PermissionDenied.into()),
                false => Ok(value),
            }
        }
    }

    impl Kernel for Fake {
        fn set_realtime(&self, since_1970: Duration) -> io::Result<()> {
            *self.clock.borrow_mut() = Some(self.done(since_1970)?);
            Ok(())
        }

        fn add_entropy(&self, bytes: &[u8]) -> io::Result<()> {
            self.entropy.borrow_mut().extend(self.done(bytes)?);
            Ok(())
        }

        fn reseed(&self) -> io::Result<()> {
            let pool = self.entropy.borrow().clone();
            *self.reseeded_with.borrow_mut() = Some(self.done(pool)?);
            Ok(())
        }

        fn take_identity(&self, identity: &Identity) -> Result<String, String> {
            let seeded = self.reseeded_with.borrow().is_some();
            let done = self.done((identity.clone(), seeded));
            *self.identity.borrow_mut() = Some(done.map_err(|e| e.to_string())?);
            Ok("former".into())
        }
    }

    fn mend(kernel: &Fake, wall_us: i64, waited: Duration, entropy: &str) -> Option<String> {
        super::mend(kernel, wall_us, waited, entropy, None).problem
    }

    fn someone() -> Identity {
        Identity {
            hostname: "fork".into(),
            machine_id: "ab".repeat(16),
            network: None,
        }
    }

    #[test]
    fn an_identity_is_taken_last_and_only_when_asked() {
        let kernel = Fake::default();
        let done = |identity| {
            let entropy = "ab".repeat(32);
            super::mend(&kernel, WALL_US, Duration::ZERO, &entropy, identity)
        };
        let nothing = Outcome {
            problem: None,
            former_hostname: None,
            is_itself: false,
        };
        assert_eq!(done(None), nothing);
        assert_eq!(*kernel.identity.borrow(), None);
        let outcome = done(Some(&someone()));
        assert_eq!(outcome.former_hostname.as_deref(), Some("former"));
        assert_eq!(*kernel.identity.borrow(), Some((someone(), true)));
        assert!(outcome.is_itself);
        // Another one's random numbers are not its own, whatever its name is.
        let same = super::mend(&kernel, WALL_US, Duration::ZERO, "", Some(&someone()));
        assert!(same.former_hostname.is_some() && !same.is_itself);
    }

    #[test]
    fn an_identity_that_was_not_taken_is_said() {
        let kernel = Fake {
            broken: true,
            ..Fake::default()
        };
        let identity = someone();
        let entropy = "ab".repeat(32);
        let outcome = super::mend(&kernel, WALL_US, Duration::ZERO, &entropy, Some(&identity));
        assert_eq!(outcome.former_hostname, None);
        let problem = outcome.problem.unwrap();
        assert!(problem.contains("identity was not taken"), "{problem}");
    }

    #[test]
    fn the_clock_is_the_hosts_plus_the_time_waited() {
        let kernel = Fake::default();
        let waited = Duration::from_millis(900);
        assert_eq!(mend(&kernel, WALL_US, waited, &"ab".repeat(32)), None);
        let now = Duration::from_millis(1_700_000_001_150);
        assert_eq!(*kernel.clock.borrow(), Some(now));
        assert_eq!(
            *kernel.reseeded_with.borrow(),
            Some(vec![0xab; 32]),
            "entropy first"
        );
    }

    #[test]
    fn every_step_that_fails_is_named() {
        let kernel = Fake {
            broken: true,
            ..Fake::default()
        };
        let problem = mend(&kernel, WALL_US, Duration::ZERO, &"ab".repeat(32)).unwrap();
        for step in ["clock was not set", "not mixed in", "not reseeded"] {
            assert!(problem.contains(step), "{step}: {problem}");
        }
    }

    #[test]
    fn nonsense_is_refused_and_the_rest_is_done() {
        for wall_us in [0, -1, i64::MIN] {
            let kernel = Fake::default();
            let problem = mend(&kernel, wall_us, Duration::ZERO, &"00".repeat(64)).unwrap();
            assert!(problem.contains(&wall_us.to_string()), "{problem}");
            assert_eq!(*kernel.clock.borrow(), None);
            assert_eq!(kernel.entropy.borrow().len(), 64);
        }
        for entropy in ["", "xy", &"00".repeat(31), &"00".repeat(65), "0"] {
            let kernel = Fake::default();
            let problem = mend(&kernel, WALL_US, Duration::ZERO, entropy).unwrap();
            assert!(
                problem.starts_with("entropy was not mixed in"),
                "{entropy}: {problem}"
            );
            assert!(kernel.clock.borrow().is_some());
            assert!(kernel.entropy.borrow().is_empty());
            assert!(kernel.reseeded_with.borrow().is_some());
        }
        let kernel = Fake::default();
        assert!(mend(&kernel, i64::MAX, Duration::MAX, &"00".repeat(32)).is_some());
    }

    /// These tests run as root, too. (No kernel takes this time, should the check ever be gone.)
    #[test]
    fn a_machine_this_is_not_the_init_of_is_left_alone() {
        let refused = |done: io::Result<()>| {
            assert_eq!(done.unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        };
        let kernel = ThisKernel(None);
        refused(kernel.set_realtime(Duration::MAX));
        refused(kernel.add_entropy(&[0; 32]));
        refused(kernel.reseed());
        let error = kernel.take_identity(&someone()).unwrap_err();
        assert!(error.contains("not the init"), "{error}");
    }

    /// The generator of this machine gets back what it gave, which leaves it as good as it was. Without the
    /// privilege the kernel refuses; anything else would mean that it did not understand us.
    #[test]
    fn the_kernel_understands_the_requests() {
        use std::io::Read;
        let mut bytes = [0; 64];
        std::fs::File::open("/dev/urandom")
            .unwrap()
            .read_exact(&mut bytes)
            .unwrap();
        let device = random_device().unwrap();
        for done in [
            sys::add_entropy(&device, &bytes[..32]),
            sys::add_entropy(&device, &bytes),
            sys::reseed(&device),
        ] {
            if let Err(error) = done {
                assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{error}");
            }
        }
        assert!(sys::add_entropy(&device, &[0; 65]).is_err());
    }
}
