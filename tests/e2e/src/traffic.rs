//! A TCP connection that never rests: numbered messages go out all the time, also while the other side
//! sleeps, and every byte that comes back is compared with the one that must.
use std::{net::SocketAddr, time::Duration};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpSocket,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
    task::JoinHandle,
};

/// Between two messages.
const PACE: Duration = Duration::from_millis(10);
/// The kernel keeps what nobody acknowledges; without room for it the sender would have to rest, too.
const SEND_BUFFER: u32 = 1 << 20;
/// TCP repeats what was lost ever more rarely while nobody answers, so this is longer than any sleep here.
const PATIENCE: Duration = Duration::from_secs(60);

/// One connection to a redis, which is asked to echo.
pub struct Traffic {
    sent: watch::Receiver<u64>,
    back: watch::Receiver<u64>,
    stop: watch::Sender<bool>,
    task: JoinHandle<Result<()>>,
}

impl Traffic {
    pub async fn start(address: SocketAddr) -> Result<Self> {
        let socket = match address {
            SocketAddr::V4(_) => TcpSocket::new_v4()?,
            SocketAddr::V6(_) => TcpSocket::new_v6()?,
        };
        socket.set_send_buffer_size(SEND_BUFFER)?;
        let stream = socket
            .connect(address)
            .await
            .with_context(|| format!("connect to {address}"))?;
        stream.set_nodelay(true)?;
        let (reader, writer) = stream.into_split();
        let (sent_to, sent) = watch::channel(0);
        let (back_to, back) = watch::channel(0);
        let (stop, stopped) = watch::channel(false);
        let task = tokio::spawn(async move {
            let writing = write(writer, &sent_to, back_to.subscribe(), stopped);
            let reading = read(reader, &back_to, sent_to.subscribe());
            tokio::try_join!(writing, reading).map(drop)
        });
        Ok(Self {
            sent,
            back,
            stop,
            task,
        })
    }

    /// Messages sent until now.
    pub fn sent(&self) -> u64 {
        *self.sent.borrow()
    }

    /// Returns once several more messages have gone out.
    pub async fn goes_on(&mut self) -> Result<()> {
        let target = self.sent() + 5;
        Self::reaches(&mut self.sent, target, &mut self.task)
            .await
            .with_context(|| format!("sending message {target}"))
    }

    /// Returns once everything that was sent until now has come back.
    pub async fn catches_up(&mut self) -> Result<()> {
        let target = self.sent();
        Self::reaches(&mut self.back, target, &mut self.task)
            .await
            .with_context(|| format!("the answer to message {target}"))
    }

    async fn reaches(
        counter: &mut watch::Receiver<u64>,
        target: u64,
        task: &mut JoinHandle<Result<()>>,
    ) -> Result<()> {
        tokio::select! {
            biased;
            ended = task => {
                ended??;
                bail!("the connection ended")
            }
            reached = tokio::time::timeout(PATIENCE, counter.wait_for(|n| *n >= target)) => {
                let reached = reached.map_err(|_| anyhow!("not within {PATIENCE:?}"));
                reached?.map(drop).context("the connection ended")
            }
        }
    }

    /// Stops sending and waits for the last answer: how many messages made the way there and back.
    pub async fn finish(mut self) -> Result<u64> {
        self.stop.send_replace(true);
        let ended = tokio::time::timeout(PATIENCE, &mut self.task);
        ended.await.context("the last answers did not come")???;
        let (sent, back) = (self.sent(), *self.back.borrow());
        ensure!(sent == back, "{sent} were sent and {back} came back");
        Ok(back)
    }
}

/// 256 bytes that belong to this number only.
fn payload(number: u64) -> String {
    (0..16)
        .map(|part| {
            let mixed = (number * 16 + part).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            format!("{mixed:016x}")
        })
        .collect()
}

/// Ends, when told to, with the end of its side of the connection; not before the last answer, because
/// redis drops what it still has to say to somebody who closes.
async fn write(
    mut writer: OwnedWriteHalf,
    sent: &watch::Sender<u64>,
    mut back: watch::Receiver<u64>,
    stopped: watch::Receiver<bool>,
) -> Result<()> {
    let mut pace = tokio::time::interval(PACE);
    pace.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut number = 0;
    while !*stopped.borrow() {
        let payload = payload(number);
        let message = format!("*2\r\n$4\r\nECHO\r\n${}\r\n{payload}\r\n", payload.len());
        writer
            .write_all(message.as_bytes())
            .await
            .with_context(|| format!("send message {number}"))?;
        number += 1;
        sent.send_replace(number);
        pace.tick().await;
    }
    back.wait_for(|back| *back >= number).await?;
    writer.shutdown().await.context("end of sending")
}

/// Ends when the other side closes, which it may only do after the last answer.
async fn read(
    mut reader: OwnedReadHalf,
    back: &watch::Sender<u64>,
    sent: watch::Receiver<u64>,
) -> Result<()> {
    let mut buffer = vec![0; 16 << 10];
    let mut wanted: Vec<u8> = Vec::new();
    let (mut number, mut position) = (0, 0);
    loop {
        let length = reader.read(&mut buffer).await.context("receive")?;
        if length == 0 {
            let sent = *sent.borrow();
            ensure!(
                position == wanted.len() && number == sent,
                "the other side closed after {number} of {sent} messages"
            );
            return Ok(());
        }
        for byte in &buffer[..length] {
            if position == wanted.len() {
                let payload = payload(number);
                wanted = format!("${}\r\n{payload}\r\n", payload.len()).into_bytes();
                position = 0;
            }
            ensure!(
                *byte == wanted[position],
                "byte {position} of answer {number} is {byte:#x}, not {:#x}",
                wanted[position]
            );
            position += 1;
            if position == wanted.len() {
                number += 1;
                back.send_replace(number);
            }
        }
    }
}
