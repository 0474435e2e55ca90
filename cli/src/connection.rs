//! Where the server is, and what lets us talk to it.
//!
//! ```text
//!   address: --url | DOZE_URL, else `listen` of the server's configuration, else the default
//!   token:   DOZE_TOKEN, else signed with the server's secret, if the server is on this host and
//!            we may read the secret; else none, and the reason is kept for the day the server asks
//! ```
use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

use doze_api::{Client, ClientError};

use crate::{failure::Failure, server};

/// Options every command has.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Options {
    /// Address of the server, for example http://127.0.0.1:4973
    #[arg(long, global = true, env = "DOZE_URL", value_name = "URL")]
    pub url: Option<String>,
    /// Bearer token; a flag would show it to everybody who lists processes, so: DOZE_TOKEN only.
    #[arg(skip)]
    pub token: Option<String>,
}

/// A server that can be called, and how to explain it when that fails.
#[derive(Debug)]
pub struct Server {
    pub client: Client,
    url: String,
    /// Why we have no token.
    no_token: Option<String>,
    options: Options,
}

/// Settles address and token. Talks to nobody yet.
pub fn connect(options: &Options) -> Result<Server, Failure> {
    let local = server::locate();
    let (url, local_url) = match (&options.url, &local) {
        (Some(url), _) => (url.clone(), is_this_host(url)),
        (None, Some(path)) => match server::listen_address(path) {
            Ok(listen) => (base_url(listen), true),
            // Its secret cannot be read either; the reason matters once the server asks for a token.
            Err(_) => (doze_api::DEFAULT_URL.to_owned(), true),
        },
        (None, None) => (doze_api::DEFAULT_URL.to_owned(), true),
    };
    let token = options
        .token
        .clone()
        .filter(|token| !token.is_empty())
        .or_else(token_of_environment);
    let (token, no_token) = match token {
        Some(token) => (Some(token), None),
        None if local_url => sign(local),
        None => (None, Some("DOZE_TOKEN is not set".to_owned())),
    };
    let client = Client::new(&url, token.as_deref()).map_err(|e| Failure::new(e.to_string()))?;
    Ok(Server {
        client,
        url,
        no_token,
        options: options.clone(),
    })
}

fn token_of_environment() -> Option<String> {
    std::env::var("DOZE_TOKEN")
        .ok()
        .map(|token| token.trim().to_owned())
        .filter(|token| !token.is_empty())
}

/// A token of our own making, or why there is none.
fn sign(local: Option<PathBuf>) -> (Option<String>, Option<String>) {
    let Some(path) = local else {
        return (
            None,
            Some(format!(
                "DOZE_TOKEN is not set and no server configuration was found ({})",
                server::PLACES
            )),
        );
    };
    match server::session_token(&path) {
        Ok(token) => (Some(token), None),
        Err(failure) => (
            None,
            Some(format!(
                "DOZE_TOKEN is not set and none could be made: {failure}"
            )),
        ),
    }
}

/// Where a server that listens on `listen` is reached from this host.
fn base_url(listen: SocketAddr) -> String {
    let mut address = listen;
    match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => {
            address.set_ip(std::net::Ipv4Addr::LOCALHOST.into())
        }
        IpAddr::V6(ip) if ip.is_unspecified() => {
            address.set_ip(std::net::Ipv6Addr::LOCALHOST.into())
        }
        IpAddr::V4(_) | IpAddr::V6(_) => {}
    }
    format!("http://{address}")
}

/// A token signed with this host's secret is nobody else's business.
fn is_this_host(url: &str) -> bool {
    let rest = url.strip_prefix("http://").unwrap_or(url);
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    let authority = authority.rsplit('@').next().unwrap_or_default();
    let host = match authority.strip_prefix('[') {
        Some(v6) => v6.split(']').next().unwrap_or_default(),
        None => authority.split(':').next().unwrap_or_default(),
    };
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

impl Server {
    /// The same server with a new token: one of our own making does not outlive a long wait.
    pub fn renewed(&self) -> Result<Server, Failure> {
        connect(&self.options)
    }

    /// A failed call in the user's words, with what to do next.
    pub fn explain(&self, error: &ClientError) -> Failure {
        let text = match error {
            ClientError::Transport { reason, .. } if reason.contains("onnection refused") => {
                format!(
                    "no server at {}; start it with `doze serve`, or set DOZE_URL to where it is",
                    self.url
                )
            }
            ClientError::Transport { .. } => {
                format!("cannot reach the server at {}: {error}", self.url)
            }
            ClientError::Api { status: 401, body } => match &self.no_token {
                Some(reason) => format!(
                    "the server at {} wants a token: {reason}; run this as the server's user, or set DOZE_TOKEN to what `doze token` prints there",
                    self.url
                ),
                None => format!(
                    "the server at {} refuses the token: {}; get a new one with `doze token` on the server's host",
                    self.url, body.message
                ),
            },
            ClientError::Api { body, .. }
                if body.code == "not_found" && body.message.contains("instance") =>
            {
                format!("{}; `doze ps -a` lists what there is", body.message)
            }
            ClientError::Api { body, .. } => {
                let details = body
                    .details
                    .iter()
                    .map(|detail| format!("; {}", detail.message));
                details.fold(body.message.clone(), |text, detail| text + &detail)
            }
            ClientError::BaseUrl { .. }
            | ClientError::Segment(_)
            | ClientError::Protocol { .. }
            | ClientError::ExecClosed(_) => error.to_string(),
            ClientError::Upload(source) => format!("cannot read the image: {source}"),
        };
        Failure::new(text)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
    use doze_api::ErrorBody;

    use super::*;

    fn server(no_token: Option<&str>) -> Server {
        let url = "http://127.0.0.1:1".to_owned();
        Server {
            client: Client::new(&url, None).unwrap(),
            url,
            no_token: no_token.map(str::to_owned),
            options: Options::default(),
        }
    }

    #[test]
    fn only_loopback_is_this_host() {
        for url in [
            "http://localhost:4973",
            "http://127.0.0.1",
            "http://127.9.9.9:1/x",
            "http://[::1]:4973/",
        ] {
            assert!(is_this_host(url), "{url}");
        }
        for url in [
            "http://example.com",
            "http://localhost.evil.example",
            "http://localhost@evil.example",
            "http://10.0.0.1",
            "http://[fe80::1]",
        ] {
            assert!(!is_this_host(url), "{url}");
        }
    }

    #[test]
    fn a_server_that_listens_everywhere_is_called_on_loopback() {
        for (listen, url) in [
            ("0.0.0.0:80", "http://127.0.0.1:80"),
            ("[::]:80", "http://[::1]:80"),
            ("10.1.2.3:4973", "http://10.1.2.3:4973"),
        ] {
            assert_eq!(base_url(listen.parse().unwrap()), url);
        }
    }

    #[test]
    fn a_missing_token_is_explained_by_what_was_tried() {
        let error = ClientError::Api {
            status: 401,
            body: ErrorBody::new("unauthorized", "no token"),
        };
        let text = server(Some("the file cannot be read"))
            .explain(&error)
            .to_string();
        assert!(
            text.contains("the file cannot be read") && text.contains("DOZE_TOKEN"),
            "{text}"
        );
        let text = server(None).explain(&error).to_string();
        assert!(text.contains("refuses the token"), "{text}");
    }

    #[tokio::test]
    async fn nobody_listening_says_how_to_start_one() {
        let free = std::net::TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap();
        let options = Options {
            url: Some(base_url(free)),
            token: Some("t".to_owned()),
        };
        let server = connect(&options).unwrap();
        let error = server.client.health().await.unwrap_err();
        let text = server.explain(&error).to_string();
        assert!(
            text.starts_with("no server at http://127.0.0.1:") && text.contains("doze serve"),
            "{text}"
        );
    }
}
