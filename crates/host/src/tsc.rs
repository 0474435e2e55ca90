//! The frequency of the host's time-stamp counter.
//!
//! A guest that reads this counter as it is (QEMU without hardware virtualisation) and has no other clock
//! to compare it with must be told. CPUs tell it themselves (leaf 0x15) only where no outer
//! hypervisor hides it, so it is measured against a clock the kernel has calibrated.
use std::{
    hint::spin_loop,
    sync::OnceLock,
    time::{Duration, Instant},
};

use rustix::time::{ClockId, clock_gettime};

/// Reading the pair of clocks has an error of some 100 ns: over 20 ms that is 5 millionths.
const SPAN: Duration = Duration::from_millis(20);

/// Tries per reading; the quickest was interrupted least.
const TRIES: usize = 16;

/// Kilohertz of the time-stamp counter. The first call measures for 20 ms without sleeping, later ones remember.
pub fn khz() -> u64 {
    static CACHE: OnceLock<u64> = OnceLock::new();
    *CACHE.get_or_init(measure)
}

fn measure() -> u64 {
    let before = read_both();
    let begun = Instant::now();
    while begun.elapsed() < SPAN {
        spin_loop();
    }
    let after = read_both();
    let ticks = u128::from(after.ticks.wrapping_sub(before.ticks));
    // SPAN has passed on one clock; the other cannot have stood still.
    let nanos = after.nanos.saturating_sub(before.nanos).max(1);
    u64::try_from((ticks * 1_000_000 + nanos / 2) / nanos).unwrap_or(u64::MAX)
}

struct Reading {
    ticks: u64,
    nanos: u128,
}

/// Both clocks at the same moment: a counter value half way around the reading of the clock.
fn read_both() -> Reading {
    let mut best = (u64::MAX, Reading { ticks: 0, nanos: 0 });
    for _ in 0..TRIES {
        let start = counter();
        // Raw: not slewed by time synchronisation, which the guest does for itself.
        let now = clock_gettime(ClockId::MonotonicRaw);
        let width = counter().wrapping_sub(start);
        if width < best.0 {
            let nanos = u128::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000
                + u128::try_from(now.tv_nsec).unwrap_or(0);
            let ticks = start.wrapping_add(width / 2);
            best = (width, Reading { ticks, nanos });
        }
    }
    best.1
}

#[allow(unsafe_code, reason = "the intrinsic has no safe wrapper")]
fn counter() -> u64 {
    // SAFETY: RDTSC reads a register; every x86-64 CPU has it and Linux lets user space execute it
    // (a process asks for the opposite by prctl(PR_SET_TSC), which we never do).
    unsafe { core::arch::x86_64::_rdtsc() }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
    use super::*;

    #[test]
    fn two_measurements_agree() {
        let (first, second) = (measure(), measure());
        // From 100 MHz to 100 GHz.
        assert!((100_000..100_000_000).contains(&first), "{first}");
        // A tenth of a per mille: a guest's clock is corrected from there on.
        assert!(first.abs_diff(second) <= first / 10_000, "{first} {second}");
        assert_eq!(khz(), khz());
    }
}
