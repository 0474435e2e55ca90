//! `/init` of the initramfs.
use std::process::ExitCode;

fn main() -> ExitCode {
    if std::process::id() != 1 {
        eprintln!(
            "doze-guest is the init of a doze guest; it runs as process 1 of a virtual machine only"
        );
        return ExitCode::from(2);
    }
    doze_guest::init::run()
}
