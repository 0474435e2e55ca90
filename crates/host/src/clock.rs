//! Clocks of the host.
//!
//! Two clocks, because each lies in its own way: the wall clock may be set, the boot clock starts
//! again with every boot. A stamp that has to survive both is a pair of them and the boot id.
use std::{
    io,
    sync::OnceLock,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rustix::time::{ClockId, clock_gettime};

/// A random UUID that the kernel draws once per boot (proc_sys_kernel(5)).
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// The kernel's boot id (`/proc/sys/kernel/random/boot_id`), read once.
///
/// # Errors
/// When the file cannot be read or is empty (for example without /proc); the next call tries again.
pub fn boot_id() -> io::Result<String> {
    static CACHE: OnceLock<String> = OnceLock::new();
    if let Some(id) = CACHE.get() {
        return Ok(id.clone());
    }
    let text = std::fs::read_to_string(BOOT_ID)
        .map_err(|e| io::Error::new(e.kind(), format!("cannot read {BOOT_ID}: {e}")))?;
    let id = text.trim();
    if id.is_empty() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("{BOOT_ID} is empty"),
        ));
    }
    Ok(CACHE.get_or_init(|| id.to_owned()).clone())
}

/// CLOCK_BOOTTIME: time since boot, suspend included.
pub fn boottime() -> Duration {
    let now = clock_gettime(ClockId::Boottime);
    // The boot clock starts at zero and never runs backwards, so neither half can be negative.
    Duration::new(
        u64::try_from(now.tv_sec).unwrap_or(0),
        u32::try_from(now.tv_nsec).unwrap_or(0),
    )
}

/// Microseconds since the Unix epoch, negative before it. Saturates beyond year 292,000.
pub fn wall_us() -> i64 {
    signed_us(SystemTime::now())
}

fn signed_us(at: SystemTime) -> i64 {
    match at.duration_since(UNIX_EPOCH) {
        Ok(after) => i64::try_from(after.as_micros()).unwrap_or(i64::MAX),
        Err(before) => i64::try_from(before.duration().as_micros()).map_or(i64::MIN, |us| -us),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
    use super::*;

    #[test]
    fn boot_id_is_the_kernels_and_stable() {
        let id = boot_id().unwrap();
        assert_eq!(id.len(), 36, "{id}");
        assert_eq!(std::fs::read_to_string(BOOT_ID).unwrap().trim(), id);
        assert_eq!(boot_id().unwrap(), id);
    }

    #[test]
    fn boottime_agrees_with_proc_uptime_and_never_runs_backwards() {
        let before = boottime();
        let text = std::fs::read_to_string("/proc/uptime").unwrap();
        let uptime: f64 = text.split(' ').next().unwrap().parse().unwrap();
        let after = boottime();
        assert!(after >= before);
        // /proc/uptime has centiseconds, cut off.
        assert!(before.as_secs_f64() - 0.01 <= uptime && uptime <= after.as_secs_f64());
    }

    #[test]
    fn wall_clock_is_signed() {
        assert_eq!(signed_us(UNIX_EPOCH), 0);
        assert_eq!(signed_us(UNIX_EPOCH + Duration::from_millis(2)), 2_000);
        assert_eq!(signed_us(UNIX_EPOCH - Duration::from_micros(3)), -3);
        assert!(wall_us() > 1_700_000_000_000_000);
    }
}
