//! Snapshots that are taken by themselves.
//!
//! ```text
//!   due ─> claimed (the next run is recorded) ─> taken ─> outcome recorded ─> retention
//! ```
//! A run is claimed before it begins: a crash loses at most one, and none is taken twice. What became due while
//! the server was away is made up for by one run, not by many. One task waits for the earliest run; each run is a
//! task of its own, at most one an instance.
use std::{
    collections::{BTreeMap, HashSet},
    sync::{Arc, Mutex, Weak},
    time::Duration,
};

use doze_lifecycle::{Cause, State};
use sha2::{Digest, Sha256};
use tokio::sync::{Notify, Semaphore};

use super::{Schedule, ScheduleRequest, Snapshot, SnapshotFilter, SnapshotKind, SnapshotRequest};
use crate::{Engine, EngineError, context::lock, engine::Shared, instance::store_error, now};

/// Runs at the same time at most.
const RUNS: usize = 4;
/// The wall clock may be set while we wait for it.
const LOOK_AGAIN: Duration = Duration::from_secs(30);
/// Microseconds by which an instance's runs come late at most, so that a fleet does not snapshot as one.
const MAX_JITTER_US: u64 = 30_000_000;

/// Mirrors the store's rows; changed only after them.
#[derive(Debug)]
pub struct Schedules {
    all: Mutex<BTreeMap<String, Schedule>>,
    running: Mutex<HashSet<String>>,
    /// One change of a row at a time.
    write: tokio::sync::Mutex<()>,
    changed: Notify,
    turns: Arc<Semaphore>,
}

impl Schedules {
    pub fn new(all: Vec<Schedule>) -> Schedules {
        let all = all
            .into_iter()
            .map(|s| (s.instance_id.clone(), s))
            .collect();
        Schedules {
            all: Mutex::new(all),
            running: Mutex::default(),
            write: tokio::sync::Mutex::default(),
            changed: Notify::new(),
            turns: Arc::new(Semaphore::new(RUNS)),
        }
    }

    fn get(&self, instance_id: &str) -> Option<Schedule> {
        lock(&self.all).get(instance_id).cloned()
    }

    /// Wakes whoever waits for the next run.
    pub fn poke(&self) {
        self.changed.notify_one();
    }

    /// The earliest run of a schedule that is not running.
    fn earliest(&self) -> Option<Schedule> {
        let running = lock(&self.running);
        let all = lock(&self.all);
        let resting = all.values().filter(|s| !running.contains(&s.instance_id));
        resting.min_by_key(|s| s.next_run_at_us).cloned()
    }
}

/// How late this instance's runs come.
fn jitter_us(instance_id: &str, interval_us: u64) -> u64 {
    let hash = Sha256::digest(instance_id.as_bytes());
    let number = u64::from_be_bytes(hash[..8].try_into().unwrap_or_default());
    number % (interval_us / 10).clamp(1, MAX_JITTER_US)
}

fn later(at_us: i64, by_us: u64) -> i64 {
    at_us.saturating_add(i64::try_from(by_us).unwrap_or(i64::MAX))
}

/// The next run on the cadence that lies after `now_us`.
fn next_run(due_us: i64, interval_us: u64, now_us: i64) -> i64 {
    let late = u64::try_from(now_us.saturating_sub(due_us)).unwrap_or(0);
    let intervals = late / interval_us.max(1) + 1;
    later(due_us, interval_us.saturating_mul(intervals))
}

/// Those that are to go, of `all` scheduled snapshots of one instance in order of creation. `kept` never goes: the
/// newest one, whatever the clocks say.
fn expired(
    all: &[Arc<Snapshot>],
    request: &ScheduleRequest,
    kept: Option<&str>,
    now_us: i64,
) -> Vec<String> {
    let most = request.max_count.map_or(usize::MAX, |n| n as usize);
    let others: Vec<_> = all.iter().filter(|s| kept != Some(s.id.as_str())).collect();
    let surplus = all.len().saturating_sub(most.max(1));
    let old = |at_us: i64| {
        let age = u64::try_from(now_us.saturating_sub(at_us)).unwrap_or(0);
        request.max_age_us.is_some_and(|most| age > most)
    };
    let gone = others.into_iter().enumerate();
    gone.filter(|(index, s)| *index < surplus || old(s.created_at_us))
        .map(|(_, s)| s.id.clone())
        .collect()
}

/// `PREFIX-20300102t150405`: 16 characters more than the prefix.
fn name_of_run(request: &ScheduleRequest, at_us: i64) -> String {
    let at = time::OffsetDateTime::from_unix_timestamp(at_us.div_euclid(1_000_000))
        .unwrap_or(time::OffsetDateTime::UNIX_EPOCH);
    let (year, month, day) = at.to_calendar_date();
    let (hour, minute, second) = at.to_hms();
    let prefix = request.name_prefix.as_deref().unwrap_or("scheduled");
    format!(
        "{prefix}-{year:04}{:02}{day:02}t{hour:02}{minute:02}{second:02}",
        u8::from(month)
    )
}

/// Its next run lies further ahead than any can: the clock was ahead when it was set.
fn is_stray(schedule: &Schedule, now_us: i64) -> bool {
    let interval = schedule.request.interval_us;
    let furthest = interval + jitter_us(&schedule.instance_id, interval);
    schedule.next_run_at_us > later(now_us, furthest)
}

impl Engine {
    async fn restart_cadence(&self, stray: &Schedule) -> Result<(), EngineError> {
        let _one = self.shared.schedules.write.lock().await;
        let (at, interval) = (now().wall_us, stray.request.interval_us);
        let next = later(at, interval + jitter_us(&stray.instance_id, interval));
        match self.shared.schedules.get(&stray.instance_id) {
            Some(current) if current == *stray => {
                let next_run_at_us = next;
                let current = Schedule {
                    next_run_at_us,
                    ..current
                };
                self.put_schedule(current).await
            }
            Some(_) | None => Ok(()),
        }
    }

    /// Sets an instance's schedule. A new interval begins a new cadence; anything else keeps the next run.
    pub async fn set_schedule(
        &self,
        key: &str,
        request: ScheduleRequest,
    ) -> Result<Schedule, EngineError> {
        let instance_id = self.open_entry(key)?.view().id.clone();
        let schedules = &self.shared.schedules;
        let _one = schedules.write.lock().await;
        let at = now().wall_us;
        let interval = request.interval_us;
        let schedule = match schedules.get(&instance_id) {
            Some(old) if old.request.interval_us == interval => Schedule {
                request,
                updated_at_us: at,
                ..old
            },
            old => Schedule {
                next_run_at_us: later(at, interval + jitter_us(&instance_id, interval)),
                request,
                created_at_us: old.as_ref().map_or(at, |old| old.created_at_us),
                updated_at_us: at,
                last_run_at_us: old.as_ref().and_then(|old| old.last_run_at_us),
                last_snapshot_id: old.as_ref().and_then(|old| old.last_snapshot_id.clone()),
                last_error: old.and_then(|old| old.last_error),
                instance_id,
            },
        };
        self.put_schedule(schedule.clone()).await?;
        Ok(schedule)
    }

    pub fn get_schedule(&self, key: &str) -> Result<Schedule, EngineError> {
        let id = self.schedule_key(key)?;
        self.shared
            .schedules
            .get(&id)
            .ok_or_else(|| no_schedule(key))
    }

    /// Its snapshots stay.
    pub async fn delete_schedule(&self, key: &str) -> Result<(), EngineError> {
        self.check_open()?;
        let id = self.schedule_key(key)?;
        let _one = self.shared.schedules.write.lock().await;
        if self.shared.schedules.get(&id).is_none() {
            return Err(no_schedule(key));
        }
        self.drop_schedule(&id).await
    }

    /// The id of an instance, also of one that is gone and whose schedule still cleans up.
    fn schedule_key(&self, key: &str) -> Result<String, EngineError> {
        match self.shared.registry.find(key) {
            Ok(entry) => Ok(entry.view().id.clone()),
            Err(_) if self.shared.schedules.get(key).is_some() => Ok(key.to_owned()),
            Err(error) => Err(error),
        }
    }

    async fn put_schedule(&self, schedule: Schedule) -> Result<(), EngineError> {
        let stored = self.shared.ctx.store.put_schedule(schedule.clone()).await;
        stored.map_err(store_error)?;
        let schedules = &self.shared.schedules;
        lock(&schedules.all).insert(schedule.instance_id.clone(), schedule);
        schedules.poke();
        Ok(())
    }

    async fn drop_schedule(&self, instance_id: &str) -> Result<(), EngineError> {
        let removed = self.shared.ctx.store.remove_schedule(instance_id).await;
        removed.map_err(store_error)?;
        lock(&self.shared.schedules.all).remove(instance_id);
        Ok(())
    }

    /// Takes the run as its own; `None` when it was changed meanwhile.
    async fn claim_run(&self, due: &Schedule) -> Result<Option<Schedule>, EngineError> {
        let schedules = &self.shared.schedules;
        let _one = schedules.write.lock().await;
        let at = now().wall_us;
        let Some(current) = schedules.get(&due.instance_id) else {
            return Ok(None);
        };
        if current.next_run_at_us != due.next_run_at_us {
            return Ok(None);
        }
        let interval = current.request.interval_us;
        let claimed = Schedule {
            next_run_at_us: next_run(current.next_run_at_us, interval, at),
            last_run_at_us: Some(at),
            ..current
        };
        self.put_schedule(claimed.clone()).await?;
        Ok(Some(claimed))
    }

    async fn run_schedule(&self, due: Schedule) {
        let id = due.instance_id.clone();
        if let Err(error) = self.run_claimed(&due).await {
            tracing::warn!(instance = %id, %error, "a scheduled snapshot's outcome could not be recorded");
            // A store that refuses is not asked again at once.
            tokio::time::sleep(LOOK_AGAIN).await;
        }
        lock(&self.shared.schedules.running).remove(&id);
        self.shared.schedules.poke();
    }

    async fn run_claimed(&self, due: &Schedule) -> Result<(), EngineError> {
        let Some(claimed) = self.claim_run(due).await? else {
            return Ok(());
        };
        let id = &claimed.instance_id;
        let taken = match self.shared.registry.find(id) {
            Ok(entry) => Some(self.scheduled_snapshot(entry, &claimed).await),
            Err(_) => None,
        };
        // It may have been removed or changed while the snapshot waited for its turn.
        let Some(current) = self.shared.schedules.get(id) else {
            return Ok(());
        };
        let Some(taken) = taken else {
            let expired = self.expire(&current, None).await;
            return self.after_deletion(&current, expired).await;
        };
        let newest = match &taken {
            Ok(snapshot) => Some(snapshot.id.clone()),
            // As long as nothing newer can be had.
            Err(_) => self.scheduled_snapshots(id).last().map(|s| s.id.clone()),
        };
        let expired = self.expire(&current, newest.as_deref()).await;
        let error = match (&taken, expired) {
            (Err(error), _) => Some(error.to_string()),
            (Ok(_), Err(error)) => Some(format!("removing expired snapshots: {error}")),
            (Ok(_), Ok(())) => None,
        };
        if let Some(error) = &error {
            tracing::warn!(instance = %id, error, "scheduled snapshot");
        }
        let _one = self.shared.schedules.write.lock().await;
        // It may have been removed or changed meanwhile.
        let Some(current) = self.shared.schedules.get(id) else {
            return Ok(());
        };
        self.put_schedule(Schedule {
            last_snapshot_id: taken.map_or(current.last_snapshot_id, |s| Some(s.id.clone())),
            last_error: error,
            ..current
        })
        .await
    }

    async fn scheduled_snapshot(
        &self,
        entry: crate::registry::Entry,
        schedule: &Schedule,
    ) -> Result<Arc<Snapshot>, EngineError> {
        let first = self.scheduled_kind(&entry, schedule).await;
        match first {
            // It changed its state before its turn came.
            Err(EngineError::InvalidState { .. }) => self.scheduled_kind(&entry, schedule).await,
            taken => taken,
        }
    }

    async fn scheduled_kind(
        &self,
        entry: &crate::registry::Entry,
        schedule: &Schedule,
    ) -> Result<Arc<Snapshot>, EngineError> {
        let kind = match entry.view().state() {
            State::Stopped => SnapshotKind::Stopped,
            State::Running | State::Standby => SnapshotKind::Standby,
            // Refused by the driver, with the reason.
            State::Created | State::Initializing | State::Paused | State::Shutdown => {
                SnapshotKind::Standby
            }
        };
        let request = SnapshotRequest {
            kind,
            name: Some(name_of_run(&schedule.request, now().wall_us)),
            tags: schedule.request.metadata.clone(),
            compression: None,
        };
        self.snapshot_as(entry.clone(), request, Cause::Schedule)
            .await
    }

    fn scheduled_snapshots(&self, instance_id: &str) -> Vec<Arc<Snapshot>> {
        let filter = SnapshotFilter {
            source_id: Some(instance_id.to_owned()),
            ..SnapshotFilter::default()
        };
        let mut all = self.list_snapshots(&filter);
        all.retain(|snapshot| snapshot.scheduled);
        all
    }

    async fn expire(&self, schedule: &Schedule, kept: Option<&str>) -> Result<(), EngineError> {
        let all = self.scheduled_snapshots(&schedule.instance_id);
        for id in expired(&all, &schedule.request, kept, now().wall_us) {
            match self.delete_snapshot(&id).await {
                // Somebody was faster.
                Ok(()) | Err(EngineError::NotFound { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Its instance is gone: it lives on as long as there is something that will expire.
    async fn after_deletion(
        &self,
        schedule: &Schedule,
        expired: Result<(), EngineError>,
    ) -> Result<(), EngineError> {
        expired?;
        let left = self.scheduled_snapshots(&schedule.instance_id);
        if left.is_empty() || schedule.request.max_age_us.is_none() {
            let _one = self.shared.schedules.write.lock().await;
            tracing::info!(instance = %schedule.instance_id, "removing the schedule of a deleted instance");
            return self.drop_schedule(&schedule.instance_id).await;
        }
        Ok(())
    }
}

fn no_schedule(key: &str) -> EngineError {
    EngineError::NotFound {
        what: "schedule",
        id: key.to_owned(),
    }
}

/// Begins what is due, until the engine closes.
pub async fn keep(shared: Weak<Shared>) {
    loop {
        let Some(strong) = shared.upgrade() else {
            return;
        };
        let engine = Engine { shared: strong };
        if engine.check_open().is_err() {
            return;
        }
        let schedules = &engine.shared.schedules;
        let wait = match schedules.earliest() {
            Some(due) if is_stray(&due, now().wall_us) => {
                if let Err(error) = engine.restart_cadence(&due).await {
                    tracing::warn!(%error, "a schedule's next run could not be set");
                    tokio::time::sleep(LOOK_AGAIN).await;
                }
                continue;
            }
            Some(due) => {
                let left = due.next_run_at_us.saturating_sub(now().wall_us);
                match u64::try_from(left) {
                    Ok(left) if left > 0 => Duration::from_micros(left).min(LOOK_AGAIN),
                    Ok(_) | Err(_) => {
                        begin(&engine, due).await;
                        continue;
                    }
                }
            }
            None => LOOK_AGAIN,
        };
        // Waits without keeping the engine alive.
        let changed = schedules_changed(&engine);
        drop(engine);
        tokio::select! {
            () = changed => {}
            () = tokio::time::sleep(wait) => {}
        }
    }
}

fn schedules_changed(engine: &Engine) -> impl Future<Output = ()> + use<> {
    let schedules = engine.shared.schedules.clone();
    async move { schedules.changed.notified().await }
}

async fn begin(engine: &Engine, due: Schedule) {
    let schedules = &engine.shared.schedules;
    let Ok(turn) = schedules.turns.clone().acquire_owned().await else {
        return;
    };
    lock(&schedules.running).insert(due.instance_id.clone());
    let engine = engine.clone();
    tokio::spawn(async move {
        let _turn = turn;
        engine.run_schedule(due).await;
    });
}

#[cfg(test)]
mod tests;
