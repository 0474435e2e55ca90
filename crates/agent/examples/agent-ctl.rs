//! Talks to a guest's agent by hand: `agent-ctl SOCKET watch|ping|shutdown|exec COMMAND...`.
//!
//! For looking at a guest without a server in between. The machine monitor accepts one
//! client at a time, so this works only while no server is connected.
use std::{error::Error, io::Write, path::PathBuf, process::ExitCode, time::Duration};

use doze_agent::{
    client::{AgentClient, ExecEvent},
    message::ExecRequest,
};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<ExitCode, Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(socket), Some(verb)) = (args.next(), args.next()) else {
        return Err("usage: agent-ctl SOCKET watch|ping|shutdown|exec COMMAND...".into());
    };
    let client = AgentClient::connect(PathBuf::from(socket));
    let mut view = client.view();
    let patience = Duration::from_secs(60);
    match verb.as_str() {
        "watch" => loop {
            println!("{:?}", *view.borrow_and_update());
            view.changed().await?;
        },
        "ping" => client.ping(patience).await?,
        "shutdown" => {
            tokio::time::timeout(patience, view.wait_for(|v| v.connected)).await??;
            client.shutdown(Duration::from_secs(10)).await?;
        }
        "exec" => {
            tokio::time::timeout(patience, view.wait_for(|v| v.agent_ready.is_some())).await??;
            let request = ExecRequest {
                command: args.collect(),
                ..ExecRequest::default()
            };
            let mut session = client.exec(request).await?;
            session.input().close().await.ok();
            while let Some(event) = session.next().await {
                match event {
                    ExecEvent::Output(bytes) => std::io::stdout().write_all(&bytes)?,
                    ExecEvent::Exit(exit) => {
                        eprintln!("{exit:?}");
                        return Ok(ExitCode::from(u8::try_from(exit.code).unwrap_or(255)));
                    }
                    ExecEvent::Failed(why) => return Err(why.into()),
                }
            }
        }
        other => return Err(format!("{other}: not a verb").into()),
    }
    client.close().await;
    Ok(ExitCode::SUCCESS)
}
