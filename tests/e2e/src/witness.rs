//! Tells whether a guest's memory is the one it had: what lies there, and the boot it comes from.
use anyhow::{Context as _, Result, bail, ensure};

use crate::{Api, exec};

/// Random content in the guest's memory and what it was when it was put there. A file on the disk, written
/// beside it, tells a boot from disk from a disk that is gone as well.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Witness {
    account: String,
}

/// The kernel makes a new identifier at every boot (random(4)).
const ACCOUNT: &str = "cat /proc/sys/kernel/random/boot_id; sha256sum < /dev/shm/witness";

impl Witness {
    /// Puts 2 MiB into the guest's memory, and a mark on its disk.
    pub async fn plant(api: &Api, key: &str) -> Result<Self> {
        let script = format!(
            "echo kept > /root/kept && sync && head -c 2097152 /dev/urandom > /dev/shm/witness && {ACCOUNT}"
        );
        let account = exec::sh(api, key, &script).await.context("plant")?;
        Ok(Self { account })
    }

    /// Puts `mib` MiB into the guest's memory, half noise and half text, 4 MiB of each in turn, and a mark on its
    /// disk. The guest's memory must be more than twice that.
    pub async fn plant_mixed(api: &Api, key: &str, mib: u32) -> Result<Self> {
        // Emulated guests make noise slowly: it is made once, and moved on by some bytes from turn to turn, so that no
        // two pages are the same.
        let script = format!(
            "echo kept > /root/kept && sync && cd /dev/shm && rm -f witness && \
             seq 1 650000 | head -c 4194304 > text && head -c 4194304 /dev/urandom > noise && \
             for i in $(seq 100 {}); do echo turn $i; cat text noise; done > witness && rm text noise && {ACCOUNT}",
            99 + mib / 8
        );
        let account = exec::long_sh(api, key, &script).await.context("plant")?;
        Ok(Self { account })
    }

    /// What lies there by now; an error when nothing does.
    pub async fn read(api: &Api, key: &str) -> Result<Self> {
        let account =
            exec::long_sh(api, key, &format!("test -e /dev/shm/witness && {ACCOUNT}")).await?;
        Ok(Self { account })
    }

    /// The guest is the same one, and its memory what it was.
    pub async fn survived(&self, api: &Api, key: &str) -> Result<()> {
        let account = exec::long_sh(api, key, ACCOUNT)
            .await
            .context("the witness in memory")?;
        ensure!(
            account == self.account,
            "the memory is another: {account:?}, was {:?}",
            self.account
        );
        Ok(())
    }

    /// The guest booted anew from the same disk.
    pub async fn lost_but_disk_kept(&self, api: &Api, key: &str) -> Result<()> {
        let script =
            "cat /proc/sys/kernel/random/boot_id; test ! -e /dev/shm/witness && cat /root/kept";
        let now = exec::sh(api, key, script)
            .await
            .context("the mark on the disk")?;
        let (Some((boot, kept)), Some((before, _))) =
            (now.split_once('\n'), self.account.split_once('\n'))
        else {
            bail!("accounts {now:?} and {:?}", self.account)
        };
        ensure!(
            boot != before && kept == "kept",
            "not a boot from its disk: {now:?}"
        );
        Ok(())
    }
}
