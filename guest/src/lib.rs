//! Static init and agent of a guest, in one program.
//!
//! ```text
//!   init (PID 1): mounts, network, program, shutdown        agent: exec sessions, reports to the host
//!        │ starts the program through `spawn`                    │ starts commands through `spawn`
//!        └────────> children (reaps everything) <────────────────┘
//!                                  port (virtio-serial) <──> doze_agent::endpoint
//! ```
//!
//! Everything runs on one thread: between two awaits nothing else happens, which is what makes
//! "start a process, then remember its id" free of races with its end.
//!
//! The agent needs no virtual machine: the tests run it on the host over a unix socket.
pub mod agent;
pub mod children;
pub mod init;
pub mod output;
pub mod port;
pub mod signals;
pub mod spawn;
mod sys;
pub mod users;
