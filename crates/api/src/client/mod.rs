//! Typed client of the API, for the CLI and for tests.
//!
//! One method per endpoint. Nothing is retried: a caller that wants that looks at
//! [`ClientError::status`]. Connections go straight to the server, never through a proxy.
mod auto_standby;
mod error;
mod exec;
mod images;
mod instances;
mod logs;
mod snapshots;
mod transfer;

use std::time::Duration;

use reqwest::{Method, RequestBuilder, Response, Url};
use serde::de::DeserializeOwned;

pub use error::ClientError;
pub use exec::{ExecEvent, ExecInput, ExecOutput, ExecSession};
pub use images::{ImportProgress, ImportRequest};
pub use instances::InstanceFilter;
pub use logs::{LogStream, LogsQuery};
pub use snapshots::SnapshotListFilter;
pub use transfer::SnapshotExport;

use crate::{Capabilities, Health};

/// A server that is there accepts at once; answers may take as long as what was asked for.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Handle to one server; clones share its connections.
#[derive(Debug, Clone)]
pub struct Client {
    base: Url,
    token: Option<String>,
    http: reqwest::Client,
}

impl Client {
    /// `base_url` is `http://host[:port][/prefix]`; `token` the JWT sent as bearer, if any.
    pub fn new(base_url: &str, token: Option<&str>) -> Result<Self, ClientError> {
        let invalid = |reason: String| ClientError::BaseUrl {
            url: base_url.to_owned(),
            reason,
        };
        let mut base = Url::parse(base_url).map_err(|error| invalid(error.to_string()))?;
        if base.scheme() != "http" {
            return Err(invalid(format!("scheme {:?}", base.scheme())));
        }
        if !base.path().ends_with('/') {
            base.set_path(&format!("{}/", base.path()));
        }
        base.set_query(None);
        base.set_fragment(None);
        let http = reqwest::Client::builder()
            .no_proxy()
            .connect_timeout(CONNECT_TIMEOUT)
            .user_agent(concat!("doze/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|error| ClientError::transport("set up the HTTP client", error))?;
        Ok(Self {
            base,
            token: token.map(str::to_owned),
            http,
        })
    }

    /// Where requests go, with a trailing slash.
    pub fn base_url(&self) -> &str {
        self.base.as_str()
    }

    /// `GET /health`. Needs no token.
    pub async fn health(&self) -> Result<Health, ClientError> {
        self.json(self.request(Method::GET, &["health"])?).await
    }

    /// `GET /capabilities`.
    pub async fn capabilities(&self) -> Result<Capabilities, ClientError> {
        self.json(self.request(Method::GET, &["capabilities"])?)
            .await
    }

    /// The address of `segments` below the base; each segment is percent-encoded.
    fn url(&self, segments: &[&str]) -> Result<Url, ClientError> {
        let mut url = self.base.clone();
        // `http` addresses always have a path; `.` and `..` would be dropped as relative segments.
        if let Some(bad) = segments.iter().find(|s| matches!(**s, "" | "." | "..")) {
            return Err(ClientError::Segment((*bad).to_owned()));
        }
        url.path_segments_mut()
            .map_err(|()| ClientError::Segment(self.base.to_string()))?
            .pop_if_empty()
            .extend(segments);
        Ok(url)
    }

    fn request(&self, method: Method, segments: &[&str]) -> Result<RequestBuilder, ClientError> {
        let request = self.http.request(method, self.url(segments)?);
        Ok(match &self.token {
            Some(token) => request.bearer_auth(token),
            None => request,
        })
    }

    /// Sends it and turns an error answer into [`ClientError::Api`].
    async fn send(&self, request: RequestBuilder) -> Result<Response, ClientError> {
        let response = request
            .send()
            .await
            .map_err(|error| ClientError::transport(self.base.as_str(), error))?;
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status();
        let body = response
            .bytes()
            .await
            .map_err(|error| ClientError::transport("read the error answer", error))?;
        Err(ClientError::api(status.as_u16(), &body))
    }

    async fn json<T: DeserializeOwned>(&self, request: RequestBuilder) -> Result<T, ClientError> {
        let response = self.send(request).await?;
        let body = response
            .bytes()
            .await
            .map_err(|error| ClientError::transport("read the answer", error))?;
        serde_json::from_slice(&body).map_err(|error| ClientError::Protocol {
            context: "the answer is not what the contract says".to_owned(),
            reason: error.to_string(),
        })
    }

    async fn empty(&self, request: RequestBuilder) -> Result<(), ClientError> {
        self.send(request).await.map(drop)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
    use super::*;

    #[test]
    fn base_urls() {
        assert_eq!(
            Client::new("http://h:1/x?q#f", None).unwrap().base_url(),
            "http://h:1/x/"
        );
        for bad in ["", "h:1", "ftp://h", "https://h", "http://"] {
            assert!(
                matches!(Client::new(bad, None), Err(ClientError::BaseUrl { .. })),
                "{bad}"
            );
        }
    }

    #[test]
    fn names_travel_in_one_segment() {
        let client = Client::new("http://h:1/prefix", None).unwrap();
        let url = client
            .url(&["images", "docker.io/library/alpine:3@sha256:ab"])
            .unwrap();
        assert_eq!(
            url.as_str(),
            "http://h:1/prefix/images/docker.io%2Flibrary%2Falpine:3@sha256:ab"
        );
        for bad in ["", ".", ".."] {
            assert!(matches!(
                client.url(&["instances", bad]),
                Err(ClientError::Segment(_))
            ));
        }
    }
}
