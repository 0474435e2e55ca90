//! Images: list, look, delete, import.
use std::collections::BTreeMap;

use bytes::{Bytes, BytesMut};
use futures::{Stream, StreamExt, stream};
use reqwest::{Body, Method, Response, header};
use tokio::{
    io::{AsyncRead, AsyncReadExt},
    sync::watch,
};

use super::{Client, ClientError};
use crate::{Image, ImportEvent};

/// Bytes read from the upload at a time.
const CHUNK: usize = 256 << 10;
/// A progress line that grows beyond this is not one.
const MAX_LINE: usize = 1 << 20;

/// What an upload is and what it shall be called.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ImportRequest {
    /// Any form of the reference; normalised by the server.
    pub name: String,
    /// `os/arch[/variant]`; the server's default when absent.
    pub platform: Option<String>,
    pub tags: BTreeMap<String, String>,
    /// Bytes of the upload, when known; lets the server refuse a too large one at once.
    pub length: Option<u64>,
}

/// How far an import is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImportProgress {
    /// Bytes handed to the connection so far.
    Sent { bytes: u64 },
    /// What the server says; never `Image` or `Error`, which end the import.
    Server(ImportEvent),
}

impl Client {
    /// `GET /images`; all `tags` must match.
    pub async fn list_images(
        &self,
        tags: &BTreeMap<String, String>,
    ) -> Result<Vec<Image>, ClientError> {
        self.json(
            self.request(Method::GET, &["images"])?
                .query(&tag_pairs(tags)),
        )
        .await
    }

    /// `GET /images/{name}`; any equivalent form of the name.
    pub async fn get_image(&self, name: &str) -> Result<Image, ClientError> {
        self.json(self.request(Method::GET, &["images", name])?)
            .await
    }

    /// `DELETE /images/{name}`; refused while an instance uses it.
    pub async fn delete_image(&self, name: &str) -> Result<(), ClientError> {
        self.empty(self.request(Method::DELETE, &["images", name])?)
            .await
    }

    /// `POST /images/import`: uploads a tar of an OCI layout or a docker archive, and answers when
    /// the image is ready. `progress` is called from within this future.
    pub async fn import_image<R>(
        &self,
        request: &ImportRequest,
        upload: R,
        mut progress: impl FnMut(ImportProgress),
    ) -> Result<Image, ClientError>
    where
        R: AsyncRead + Send + Unpin + 'static,
    {
        let mut query = tag_pairs(&request.tags);
        query.push(("name".to_owned(), request.name.clone()));
        query.extend(
            request
                .platform
                .iter()
                .map(|platform| ("platform".to_owned(), platform.clone())),
        );
        let (sent, mut seen) = watch::channel(0u64);
        let mut builder = self
            .request(Method::POST, &["images", "import"])?
            .query(&query)
            .header(header::CONTENT_TYPE, "application/x-tar")
            .header(header::ACCEPT, "application/x-ndjson")
            .body(Body::wrap_stream(chunks(upload, sent)));
        if let Some(length) = request.length {
            builder = builder.header(header::CONTENT_LENGTH, length);
        }
        let answer = self.send(builder);
        tokio::pin!(answer);
        let response = loop {
            tokio::select! {
                response = &mut answer => break response?,
                Ok(()) = seen.changed() => {
                    let bytes = *seen.borrow_and_update();
                    progress(ImportProgress::Sent { bytes });
                }
            }
        };
        follow_import(response, &mut progress).await
    }
}

/// Reads progress lines up to the image.
async fn follow_import(
    mut response: Response,
    progress: &mut impl FnMut(ImportProgress),
) -> Result<Image, ClientError> {
    let mut buffer = BytesMut::new();
    loop {
        while let Some(end) = buffer.iter().position(|byte| *byte == b'\n') {
            let line = buffer.split_to(end + 1);
            let event =
                serde_json::from_slice(&line).map_err(|error| protocol(&error.to_string()))?;
            match event {
                ImportEvent::Image { image } => return Ok(*image),
                ImportEvent::Error { status, error } => {
                    return Err(ClientError::Api {
                        status,
                        body: error,
                    });
                }
                event @ (ImportEvent::Received { .. }
                | ImportEvent::Reading { .. }
                | ImportEvent::Layer { .. }
                | ImportEvent::Building) => progress(ImportProgress::Server(event)),
            }
        }
        if buffer.len() > MAX_LINE {
            return Err(protocol("a progress line is too long"));
        }
        match response.chunk().await {
            Ok(Some(chunk)) => buffer.extend_from_slice(&chunk),
            Ok(None) => return Err(protocol("the answer ended before the image was ready")),
            Err(error) => return Err(ClientError::transport("read the import's progress", error)),
        }
    }
}

/// What is read, as a body; `sent` is told how much.
pub(super) fn chunks<R: AsyncRead + Send + Unpin + 'static>(
    upload: R,
    sent: watch::Sender<u64>,
) -> impl Stream<Item = Result<Bytes, std::io::Error>> + Send + 'static {
    stream::try_unfold((upload, sent), |(mut upload, sent)| async move {
        let mut chunk = BytesMut::with_capacity(CHUNK);
        let count = upload.read_buf(&mut chunk).await?;
        if count == 0 {
            return Ok(None);
        }
        sent.send_modify(|total| *total += count as u64);
        Ok(Some((chunk.freeze(), (upload, sent))))
    })
    .boxed()
}

fn tag_pairs(tags: &BTreeMap<String, String>) -> Vec<(String, String)> {
    tags.iter()
        .map(|(key, value)| (format!("tags[{key}]"), value.clone()))
        .collect()
}

fn protocol(reason: &str) -> ClientError {
    ClientError::Protocol {
        context: "image import".to_owned(),
        reason: reason.to_owned(),
    }
}
