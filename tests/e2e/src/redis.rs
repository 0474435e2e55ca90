//! Just enough RESP to talk to a real redis in a guest (<https://redis.io/docs/latest/develop/reference/protocol-spec/>).
use std::{net::SocketAddr, time::Duration};

use anyhow::{Context as _, Result, bail};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::TcpStream,
};

/// One connection.
pub struct Redis {
    stream: BufReader<TcpStream>,
}

impl Redis {
    /// One attempt, given up after `timeout`.
    pub async fn connect(address: SocketAddr, timeout: Duration) -> Result<Self> {
        let stream = tokio::time::timeout(timeout, TcpStream::connect(address))
            .await
            .with_context(|| format!("connect to {address}: no answer within {timeout:?}"))?
            .with_context(|| format!("connect to {address}"))?;
        Ok(Self {
            stream: BufReader::new(stream),
        })
    }

    /// The guest's program needs a moment after the agent is ready: tries until PING answers.
    pub async fn ready(address: SocketAddr, within: Duration) -> Result<Self> {
        let attempts = async {
            loop {
                if let Ok(mut redis) = Self::connect(address, Duration::from_secs(5)).await
                    && redis.command(&["PING"]).await.is_ok_and(|a| a == "PONG")
                {
                    return redis;
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        tokio::time::timeout(within, attempts)
            .await
            .with_context(|| format!("redis at {address} did not answer within {within:?}"))
    }

    /// Sends a command; simple strings, integers and bulk strings come back as text, nil as "(nil)".
    pub async fn command(&mut self, words: &[&str]) -> Result<String> {
        let mut request = format!("*{}\r\n", words.len());
        for word in words {
            request.push_str(&format!("${}\r\n{word}\r\n", word.len()));
        }
        let exchange = async {
            self.stream.get_mut().write_all(request.as_bytes()).await?;
            self.answer().await
        };
        tokio::time::timeout(Duration::from_secs(20), exchange)
            .await
            .with_context(|| format!("{words:?}: no answer"))?
    }

    async fn answer(&mut self) -> Result<String> {
        let mut line = String::new();
        self.stream.read_line(&mut line).await?;
        let line = line.trim_end();
        match line.split_at_checked(1) {
            Some(("+" | ":", rest)) => Ok(rest.to_owned()),
            Some(("-", rest)) => bail!("redis says: {rest}"),
            Some(("$", "-1")) => Ok("(nil)".into()),
            Some(("$", length)) => {
                let mut data = vec![0; length.parse::<usize>()? + 2];
                self.stream.read_exact(&mut data).await?;
                data.truncate(data.len() - 2);
                Ok(String::from_utf8(data)?)
            }
            _ => bail!("not RESP: {line:?}"),
        }
    }
}
