//! Create: a recorded instance gets its files and boots. Undone completely when it fails.
use std::process::Stdio;

use doze_host::files;
use doze_lifecycle::Fact;

use super::{Cancel, check, delete, launch};
use crate::{
    EngineError,
    context::{blocking, io_error},
    instance::{Instance, OVERLAY},
    kill::KillPoint,
};

/// Runs with the record already in the store (state Created, operation Create). The flag says that
/// nothing of the instance is left: it failed and was undone.
pub async fn run(instance: &mut Instance, cancel: &Cancel) -> (Result<(), EngineError>, bool) {
    instance.reach(KillPoint::CreateRecorded);
    let made = make(instance, cancel).await;
    or_undo(instance, made).await
}

/// Of a new instance that could not be made nothing is left; the flag says that nothing is.
pub async fn or_undo(
    instance: &mut Instance,
    made: Result<(), EngineError>,
) -> (Result<(), EngineError>, bool) {
    let Err(error) = made else {
        return (Ok(()), false);
    };
    match undo(instance, &error.to_string()).await {
        Ok(()) => (Err(error), true),
        Err(undoing) => {
            instance.note(&format!("undoing it failed: {undoing}"));
            let reason = format!("{error}; undoing it failed too: {undoing}");
            (
                Err(EngineError::Internal {
                    context: "create".into(),
                    reason,
                }),
                false,
            )
        }
    }
}

async fn make(instance: &mut Instance, cancel: &Cancel) -> Result<(), EngineError> {
    let dir = instance.dir();
    blocking("making the instance's folder", move || {
        files::create_private_dir(&dir)
    })
    .await?
    .map_err(io_error("making the instance's folder"))?;
    make_overlay(instance).await?;
    launch::write_config(instance).await?;
    instance.reach(KillPoint::CreateFilesMade);
    check(cancel)?;
    launch::run(instance, cancel).await
}

/// From now on the record says that this instance is being deleted, so a crash here goes on deleting.
pub async fn undo(instance: &mut Instance, reason: &str) -> Result<(), EngineError> {
    instance.note(&format!("making it failed: {reason}"));
    launch::end_failed(instance).await?;
    instance
        .commit(Fact::OperationFailed {
            reason: reason.to_owned(),
        })
        .await?;
    delete::dismantle(instance).await
}

/// A sparse ext4 file system for what the guest writes.
async fn make_overlay(instance: &Instance) -> Result<(), EngineError> {
    let path = instance.dir().join(OVERLAY);
    let (file, size) = (path.clone(), instance.spec.overlay_bytes);
    blocking("making the overlay disk", move || {
        files::create_sparse(&file, size)
    })
    .await?
    .map_err(io_error("making the overlay disk"))?;
    let mut command = tokio::process::Command::new("mke2fs");
    command
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .args(["-q", "-F", "-t", "ext4", "-m", "0"])
        // Nothing is written that the guest's kernel can do lazily: the file stays sparse.
        .args([
            "-E",
            "lazy_itable_init=1,lazy_journal_init=1,nodiscard",
            "-L",
            "overlay",
        ])
        .arg(&path)
        .stdin(Stdio::null())
        .kill_on_drop(true);
    let output = command.output().await.map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => EngineError::DependencyMissing {
            what: "mke2fs is not installed".into(),
            mend: "apt-get install e2fsprogs".into(),
        },
        _ => io_error("running mke2fs")(e),
    })?;
    if !output.status.success() {
        return Err(EngineError::Internal {
            context: "mke2fs of the overlay disk".into(),
            reason: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        });
    }
    Ok(())
}
