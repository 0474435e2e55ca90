//! Crashes and failures at every step of every operation.
//!
//! The engine is real, with its store and its files; machine monitors and guests are fakes that can fail
//! at any call and that know when a guest's memory is lost or mixed up. See `world` for what they model,
//! `steps` for where a run can be disturbed, `check` for what must hold afterwards.
//!
//! `DOZE_CAMPAIGN_ROUNDS=N` makes it more thorough; `DOZE_CAMPAIGN_SEED` repeats a random run; `DOZE_CAMPAIGN_ONLY=NAME`
//! runs the scenarios whose names contain it.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

mod answers;
mod campaign;
mod check;
mod commands;
mod commits;
mod content;
mod copies;
mod failures;
mod guest;
mod lab;
mod monitor;
mod pool;
mod random;
mod scenario;
mod scenarios;
mod steps;
mod transfer;
mod world;
