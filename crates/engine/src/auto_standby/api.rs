//! The engine's face for auto-standby.
use std::sync::Arc;

use doze_host::conntrack::policy::Policy;

use super::{AutoStandbyMetrics, Status};
use crate::{Engine, EngineError, InstanceView, driver::Message};

impl Engine {
    /// Replaces the instance's policy; answers when that is durable. An operation in flight is waited for.
    pub async fn set_auto_standby(
        &self,
        key: &str,
        auto_standby: Policy,
    ) -> Result<Arc<InstanceView>, EngineError> {
        self.command(key, |reply| Message::Update {
            auto_standby,
            reply,
        })
        .await
    }

    pub fn auto_standby_status(&self, key: &str) -> Result<Status, EngineError> {
        let entry = self.shared.registry.find(key)?;
        Ok(self.shared.auto_standby.status(&entry))
    }

    /// Keeps the instance from falling asleep by itself for one idle timeout from now. Without a policy
    /// that is on there is nothing to keep it from.
    ///
    /// # Errors
    /// [`EngineError::Asleep`]: it sleeps, or nothing can stop it any more.
    pub async fn hold_awake(&self, key: &str) -> Result<Status, EngineError> {
        let entry = self.shared.registry.find(key)?;
        self.shared.auto_standby.hold(&entry).await
    }

    /// Hears nothing of connections for so long, for tests of what depends on it.
    #[doc(hidden)]
    pub fn cut_conntrack(&self, duration: std::time::Duration) {
        if let Some(eyes) = self.shared.auto_standby.eyes() {
            eyes.tracker().cut(duration);
        }
    }

    pub fn auto_standby_metrics(&self) -> AutoStandbyMetrics {
        let entries = self.shared.registry.all();
        self.shared.auto_standby.metrics(&entries)
    }
}
