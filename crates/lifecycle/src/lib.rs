//! The rules of an instance's life, and nothing that can fail for outside reasons: no clock, no
//! file, no task. Everything here is a function of its arguments.
//!
//! ```text
//!   command ──> admission::admit ──> the engine acts on the host ──> fact + stamp
//!                                                                        │
//!            store (durable) <── new Record <── Record::apply <──────────┘
//!                                                  └── moves the phase ledger
//! ```
//!
//! Invariants
//! - [`Record::apply`] is the only thing that changes a record.
//! - The ledger's sums plus its live part equal the time elapsed on its timeline.
pub mod admission;
pub mod duration;
pub mod fact;
pub mod ledger;
pub mod record;
pub mod state;

pub use admission::{Admission, Command, Refusal};
pub use fact::{Exit, Fact, Operation, ProcessRef};
pub use ledger::{Cause, KEPT_TRANSITIONS, Ledger, Stamp, Transition};
pub use record::{IllegalFact, Record};
pub use state::State;
