//! The project's own tools, run as `cargo run -p xtask -- TASK`. One module per task.
use clap::Parser;

mod check_deps;
mod demo_image;

#[derive(Debug, Parser)]
#[command(about = "The project's own tools")]
enum Task {
    /// Refuse dependencies between our crates that point the wrong way
    CheckDeps,
    DemoImage(demo_image::Args),
}

fn main() -> anyhow::Result<()> {
    match Task::parse() {
        Task::CheckDeps => check_deps::run(),
        Task::DemoImage(args) => demo_image::run(&args),
    }
}
