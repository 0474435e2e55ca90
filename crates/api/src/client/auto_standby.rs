//! Automatic standby: its policy, status and hold.
use reqwest::Method;

use super::{Client, ClientError};
use crate::{AutoStandbyStatus, Instance, UpdateInstanceRequest};

impl Client {
    /// `PATCH /instances/{id}`.
    pub async fn update_instance(
        &self,
        id: &str,
        request: &UpdateInstanceRequest,
    ) -> Result<Instance, ClientError> {
        let patch = self.request(Method::PATCH, &["instances", id])?;
        self.json(patch.json(request)).await
    }

    /// `GET /instances/{id}/auto-standby/status`.
    pub async fn auto_standby_status(&self, id: &str) -> Result<AutoStandbyStatus, ClientError> {
        let path = ["instances", id, "auto-standby", "status"];
        self.json(self.request(Method::GET, &path)?).await
    }

    /// `POST /instances/{id}/auto-standby/hold`: awake for one idle timeout from now.
    pub async fn hold_instance(&self, id: &str) -> Result<AutoStandbyStatus, ClientError> {
        let path = ["instances", id, "auto-standby", "hold"];
        self.json(self.request(Method::POST, &path)?).await
    }
}
