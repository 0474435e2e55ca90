//! Which part of a large set of cases a run takes. A test run takes a sample that its seed decides, a
//! campaign takes all; the seed is printed, so that any run can be repeated.
//!
//! - `DOZE_E2E_CAMPAIGN=1`: all cases, whatever the seed.
//! - `DOZE_E2E_SEED=N`: this seed instead of a new one.
use std::env;

use anyhow::{Context as _, Result, bail};

const CAMPAIGN: &str = "DOZE_E2E_CAMPAIGN";
const SEED: &str = "DOZE_E2E_SEED";

/// How much a run takes, and the seed of everything random in it.
#[derive(Debug, Clone, Copy)]
pub struct Sample {
    pub seed: u64,
    /// Take everything.
    pub campaign: bool,
}

impl Sample {
    /// From the environment; the seed, if not given, from the clock.
    pub fn from_env() -> Result<Self> {
        let campaign = match env::var(CAMPAIGN).as_deref() {
            Err(_) | Ok("" | "0") => false,
            Ok("1") => true,
            Ok(other) => bail!("{CAMPAIGN} is {other:?}; it must be 1 or 0"),
        };
        let seed = match env::var(SEED) {
            Ok(text) => text
                .parse()
                .with_context(|| format!("{SEED} is {text:?}; it must be a number"))?,
            Err(_) => u64::from(std::process::id()) ^ (clock() << 20),
        };
        Ok(Self { seed, campaign })
    }

    /// Random numbers of their own for each purpose: one more case does not change the others.
    pub fn random(&self, purpose: &str) -> Random {
        let mut state = self.seed;
        for byte in purpose.bytes() {
            state = Random { state }.draw() ^ u64::from(byte);
        }
        Random { state }
    }
}

fn clock() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| since.subsec_nanos().into())
}

/// SplitMix64 (<https://prng.di.unimi.it/splitmix64.c>): good enough to choose cases.
#[derive(Debug, Clone)]
pub struct Random {
    state: u64,
}

impl Random {
    pub fn draw(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From 0 to `end`, `end` not included; 0 when `end` is 0.
    pub fn below(&mut self, end: usize) -> usize {
        let end = u64::try_from(end).unwrap_or(u64::MAX).max(1);
        usize::try_from(self.draw() % end).unwrap_or(0)
    }

    /// Up to `count` of these, each at most once.
    pub fn choose<T>(&mut self, mut items: Vec<T>, count: usize) -> Vec<T> {
        let mut chosen = Vec::new();
        while chosen.len() < count && !items.is_empty() {
            chosen.push(items.swap_remove(self.below(items.len())));
        }
        chosen
    }
}
