//! Clocks of the host.
use std::{io, time::Duration};

/// The kernel's boot id (`/proc/sys/kernel/random/boot_id`), read once.
pub fn boot_id() -> io::Result<String> {
    unimplemented!()
}
/// CLOCK_BOOTTIME: time since boot, suspend included.
pub fn boottime() -> Duration {
    unimplemented!()
}
/// Microseconds since the Unix epoch, negative before it.
pub fn wall_us() -> i64 {
    unimplemented!()
}
