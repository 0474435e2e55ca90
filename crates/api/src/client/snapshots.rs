//! Snapshots, forks, schedules, and what the host has.
use std::collections::BTreeMap;

use reqwest::Method;

use super::{Client, ClientError};
use crate::{
    CreateSnapshotRequest, ForkInstanceRequest, ForkSnapshotRequest, Instance, Resources,
    RestoreSnapshotRequest, SetSnapshotScheduleRequest, Snapshot, SnapshotKind, SnapshotSchedule,
};

/// Which snapshots to list; all conditions must hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SnapshotListFilter {
    pub kind: Option<SnapshotKind>,
    pub name: Option<String>,
    /// The id, which outlives the instance and its name.
    pub source_instance_id: Option<String>,
    pub tags: BTreeMap<String, String>,
}

impl SnapshotListFilter {
    fn query(&self) -> Vec<(String, String)> {
        let plain = [
            ("kind", self.kind.map(|kind| kind.to_string())),
            ("name", self.name.clone()),
            ("source_instance_id", self.source_instance_id.clone()),
        ];
        let plain = plain
            .into_iter()
            .filter_map(|(key, value)| Some((key.to_owned(), value?)));
        let tags = self
            .tags
            .iter()
            .map(|(key, value)| (format!("tags[{key}]"), value.clone()));
        plain.chain(tags).collect()
    }
}

impl Client {
    /// `POST /instances/{id}/snapshots`: answers when the copy is durable.
    pub async fn create_snapshot(
        &self,
        id: &str,
        request: &CreateSnapshotRequest,
    ) -> Result<Snapshot, ClientError> {
        let segments = ["instances", id, "snapshots"];
        self.json(self.request(Method::POST, &segments)?.json(request))
            .await
    }

    /// `POST /instances/{id}/snapshots/{snapshot_id}/restore`: brings the instance back to that moment.
    pub async fn restore_snapshot(
        &self,
        id: &str,
        snapshot: &str,
        request: &RestoreSnapshotRequest,
    ) -> Result<Instance, ClientError> {
        let segments = ["instances", id, "snapshots", snapshot, "restore"];
        self.json(self.request(Method::POST, &segments)?.json(request))
            .await
    }

    /// `GET /snapshots`, in order of creation.
    pub async fn list_snapshots(
        &self,
        filter: &SnapshotListFilter,
    ) -> Result<Vec<Snapshot>, ClientError> {
        self.json(
            self.request(Method::GET, &["snapshots"])?
                .query(&filter.query()),
        )
        .await
    }

    /// `GET /snapshots/{snapshot_id}`; an id or a unique prefix of one, here and below.
    pub async fn get_snapshot(&self, snapshot: &str) -> Result<Snapshot, ClientError> {
        self.json(self.request(Method::GET, &["snapshots", snapshot])?)
            .await
    }

    /// `DELETE /snapshots/{snapshot_id}`.
    pub async fn delete_snapshot(&self, snapshot: &str) -> Result<(), ClientError> {
        self.empty(self.request(Method::DELETE, &["snapshots", snapshot])?)
            .await
    }

    /// `POST /snapshots/{snapshot_id}/fork`: a new instance from a snapshot.
    pub async fn fork_snapshot(
        &self,
        snapshot: &str,
        request: &ForkSnapshotRequest,
    ) -> Result<Instance, ClientError> {
        let segments = ["snapshots", snapshot, "fork"];
        self.json(self.request(Method::POST, &segments)?.json(request))
            .await
    }

    /// `POST /instances/{id}/fork`: a new instance from an instance.
    pub async fn fork_instance(
        &self,
        id: &str,
        request: &ForkInstanceRequest,
    ) -> Result<Instance, ClientError> {
        let segments = ["instances", id, "fork"];
        self.json(self.request(Method::POST, &segments)?.json(request))
            .await
    }

    /// `PUT /instances/{id}/snapshot-schedule`: replaces the one there is.
    pub async fn set_snapshot_schedule(
        &self,
        id: &str,
        request: &SetSnapshotScheduleRequest,
    ) -> Result<SnapshotSchedule, ClientError> {
        let segments = ["instances", id, "snapshot-schedule"];
        self.json(self.request(Method::PUT, &segments)?.json(request))
            .await
    }

    /// `GET /instances/{id}/snapshot-schedule`.
    pub async fn get_snapshot_schedule(&self, id: &str) -> Result<SnapshotSchedule, ClientError> {
        let segments = ["instances", id, "snapshot-schedule"];
        self.json(self.request(Method::GET, &segments)?).await
    }

    /// `DELETE /instances/{id}/snapshot-schedule`: its snapshots stay.
    pub async fn delete_snapshot_schedule(&self, id: &str) -> Result<(), ClientError> {
        let segments = ["instances", id, "snapshot-schedule"];
        self.empty(self.request(Method::DELETE, &segments)?).await
    }

    /// `GET /resources`.
    pub async fn resources(&self) -> Result<Resources, ClientError> {
        self.json(self.request(Method::GET, &["resources"])?).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_are_named_as_the_contract_names_them() {
        let filter = SnapshotListFilter {
            kind: Some(SnapshotKind::Stopped),
            name: Some("before".to_owned()),
            source_instance_id: Some("i".to_owned()),
            tags: BTreeMap::from([("team".to_owned(), "a b".to_owned())]),
        };
        let pair = |key: &str, value: &str| (key.to_owned(), value.to_owned());
        assert_eq!(
            filter.query(),
            [
                pair("kind", "Stopped"),
                pair("name", "before"),
                pair("source_instance_id", "i"),
                pair("tags[team]", "a b"),
            ]
        );
        assert_eq!(SnapshotListFilter::default().query(), []);
    }
}
