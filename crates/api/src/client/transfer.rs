//! Snapshots that move from one server to another.
use bytes::Bytes;
use reqwest::{Body, Method, Response, header};
use tokio::{io::AsyncRead, sync::watch};

use super::{Client, ClientError, images::chunks};
use crate::Snapshot;

/// An exported snapshot on its way. Only one that came to its end is whole.
#[derive(Debug)]
pub struct SnapshotExport {
    response: Response,
}

impl SnapshotExport {
    /// The next bytes; `None` at the end.
    pub async fn chunk(&mut self) -> Result<Option<Bytes>, ClientError> {
        self.response
            .chunk()
            .await
            .map_err(|error| ClientError::transport("read the exported snapshot", error))
    }
}

impl Client {
    /// `GET /snapshots/{snapshot_id}/export`.
    pub async fn export_snapshot(&self, snapshot: &str) -> Result<SnapshotExport, ClientError> {
        let segments = ["snapshots", snapshot, "export"];
        let response = self.send(self.request(Method::GET, &segments)?).await?;
        Ok(SnapshotExport { response })
    }

    /// `POST /snapshots/import`: answers when the snapshot is durable. `length`: bytes, when known; `progress` is
    /// told how many were handed to the connection, from within this future.
    pub async fn import_snapshot<R>(
        &self,
        name: Option<&str>,
        upload: R,
        length: Option<u64>,
        mut progress: impl FnMut(u64),
    ) -> Result<Snapshot, ClientError>
    where
        R: AsyncRead + Send + Unpin + 'static,
    {
        let query: Vec<_> = name.iter().map(|name| ("name", *name)).collect();
        let (sent, mut seen) = watch::channel(0_u64);
        let mut builder = self
            .request(Method::POST, &["snapshots", "import"])?
            .query(&query)
            .header(header::CONTENT_TYPE, "application/octet-stream")
            .body(Body::wrap_stream(chunks(upload, sent)));
        if let Some(length) = length {
            builder = builder.header(header::CONTENT_LENGTH, length);
        }
        let answer = self.json(builder);
        tokio::pin!(answer);
        loop {
            tokio::select! {
                answer = &mut answer => return answer,
                Ok(()) = seen.changed() => progress(*seen.borrow_and_update()),
            }
        }
    }
}
