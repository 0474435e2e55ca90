//! Instances: create, look, start, stop, wait, delete.
use std::collections::BTreeMap;

use reqwest::Method;

use super::{Client, ClientError};
use crate::{
    CreateInstanceRequest, Instance, InstancePhases, InstanceState, StandbyInstanceRequest,
    StartInstanceRequest, WaitForStateResponse,
};

/// Which instances to list; all conditions must hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct InstanceFilter {
    pub state: Option<InstanceState>,
    pub tags: BTreeMap<String, String>,
}

impl InstanceFilter {
    fn query(&self) -> Vec<(String, String)> {
        let state = self
            .state
            .map(|state| ("state".to_owned(), state.to_string()));
        let tags = self
            .tags
            .iter()
            .map(|(key, value)| (format!("tags[{key}]"), value.clone()));
        state.into_iter().chain(tags).collect()
    }
}

impl Client {
    /// `POST /instances`: makes and boots one; answers when the guest's CPUs run.
    pub async fn create_instance(
        &self,
        request: &CreateInstanceRequest,
    ) -> Result<Instance, ClientError> {
        self.json(self.request(Method::POST, &["instances"])?.json(request))
            .await
    }

    /// `GET /instances`.
    pub async fn list_instances(
        &self,
        filter: &InstanceFilter,
    ) -> Result<Vec<Instance>, ClientError> {
        self.json(
            self.request(Method::GET, &["instances"])?
                .query(&filter.query()),
        )
        .await
    }

    /// `GET /instances/{id}`; `id` is an id, a name or a unique prefix of an id, here and below.
    pub async fn get_instance(&self, id: &str) -> Result<Instance, ClientError> {
        self.json(self.request(Method::GET, &["instances", id])?)
            .await
    }

    /// `DELETE /instances/{id}`; `None` leaves it to the server whether the guest is asked first.
    pub async fn delete_instance(
        &self,
        id: &str,
        graceful_shutdown: Option<bool>,
    ) -> Result<(), ClientError> {
        let query = graceful_shutdown.map(|graceful| ("graceful_shutdown", graceful));
        self.empty(
            self.request(Method::DELETE, &["instances", id])?
                .query(query.as_slice()),
        )
        .await
    }

    /// `POST /instances/{id}/start`.
    pub async fn start_instance(
        &self,
        id: &str,
        request: &StartInstanceRequest,
    ) -> Result<Instance, ClientError> {
        self.json(
            self.request(Method::POST, &["instances", id, "start"])?
                .json(request),
        )
        .await
    }

    /// `POST /instances/{id}/stop`.
    pub async fn stop_instance(&self, id: &str) -> Result<Instance, ClientError> {
        self.json(self.request(Method::POST, &["instances", id, "stop"])?)
            .await
    }

    /// `POST /instances/{id}/standby`.
    pub async fn standby_instance(
        &self,
        id: &str,
        request: &StandbyInstanceRequest,
    ) -> Result<Instance, ClientError> {
        self.json(
            self.request(Method::POST, &["instances", id, "standby"])?
                .json(request),
        )
        .await
    }

    /// `POST /instances/{id}/restore`.
    pub async fn restore_instance(&self, id: &str) -> Result<Instance, ClientError> {
        self.json(self.request(Method::POST, &["instances", id, "restore"])?)
            .await
    }

    /// `GET /instances/{id}/phases`.
    pub async fn instance_phases(&self, id: &str) -> Result<InstancePhases, ClientError> {
        self.json(self.request(Method::GET, &["instances", id, "phases"])?)
            .await
    }

    /// `GET /instances/{id}/wait`; `timeout` is a Go duration (`30s`), the server's default is 60 s
    /// and its limit 5 minutes.
    pub async fn wait_instance(
        &self,
        id: &str,
        state: InstanceState,
        timeout: Option<&str>,
    ) -> Result<WaitForStateResponse, ClientError> {
        let mut query = vec![("state", state.as_str())];
        query.extend(timeout.map(|timeout| ("timeout", timeout)));
        self.json(
            self.request(Method::GET, &["instances", id, "wait"])?
                .query(&query),
        )
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_are_deep_objects() {
        let filter = InstanceFilter {
            state: Some(InstanceState::Running),
            tags: BTreeMap::from([("team".to_owned(), "a b".to_owned())]),
        };
        assert_eq!(
            filter.query(),
            [
                ("state".to_owned(), "Running".to_owned()),
                ("tags[team]".to_owned(), "a b".to_owned())
            ]
        );
    }
}
