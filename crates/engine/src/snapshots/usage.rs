//! What all of this costs in disk and memory.
use std::{sync::Arc, time::Instant};

use doze_host::{files, usage};

use super::DiskUsage;
use crate::{
    Engine, EngineError,
    context::{Context, blocking, io_error},
    instance::{OVERLAY, SNAPSHOT},
};

impl Engine {
    /// Bytes of disk that a snapshot's files hold; extents it shares with others count, too.
    pub async fn snapshot_allocated(&self, id: &str) -> Result<u64, EngineError> {
        let dir = self.shared.ctx.snapshot_dir(id);
        blocking(
            "measuring a snapshot",
            move || match files::allocated_bytes(&dir) {
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(0),
                measured => measured,
            },
        )
        .await?
        .map_err(io_error("measuring a snapshot"))
    }

    /// Measures the disk: looks at every file of ours, so one after the other; those who ask at the
    /// same time share one answer.
    pub async fn disk_usage(&self) -> Result<DiskUsage, EngineError> {
        let ctx = self.shared.ctx.clone();
        let asked = Instant::now();
        let mut last = ctx.measured.lock().await;
        // Those who came while it was measured for somebody else share what began after they had asked.
        if let Some((begun, usage)) = &*last
            && *begun > asked
        {
            return Ok(usage.clone());
        }
        let begun = Instant::now();
        let usage = self.measure_disk(ctx.clone()).await?;
        *last = Some((begun, usage.clone()));
        Ok(usage)
    }

    async fn measure_disk(&self, ctx: Arc<Context>) -> Result<DiskUsage, EngineError> {
        let instances: Vec<_> = self
            .list()
            .iter()
            .map(|view| (view.id.clone(), view.name.clone()))
            .collect();
        blocking("measuring the disk", move || {
            let data = ctx.config.data_dir.clone();
            let mut all = usage::DiskUsage::new();
            let mut add = |path: std::path::PathBuf| match all.add(&path) {
                // What vanishes meanwhile counts nothing.
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(0),
                added => added,
            };
            let mut found = DiskUsage {
                capacity: files::total_space(&data)?,
                free: files::free_space(&data)?,
                images: add(data.join("images"))?,
                ..DiskUsage::default()
            };
            for (id, name) in instances {
                let dir = ctx.instance_dir(&id);
                found.overlays += add(dir.join(OVERLAY))?;
                found.memory += add(dir.join(SNAPSHOT))?;
                if let Ok(name) = crate::compression::files::held(&dir) {
                    found.memory += add(dir.join(name))?;
                }
                let own = match files::allocated_bytes(&dir) {
                    Err(e) if e.kind() == std::io::ErrorKind::NotFound => 0,
                    measured => measured?,
                };
                found.instances.push((id, name, own));
            }
            found.snapshots = add(ctx.snapshots_dir())?;
            add(data)?;
            found.allocated = all.bytes();
            Ok(found)
        })
        .await?
        .map_err(io_error("measuring the disk"))
    }

    /// Bytes of memory booked by machines, and the limit they count against.
    pub fn memory_usage(&self) -> (u64, u64) {
        self.shared.ctx.memory_usage()
    }
}
