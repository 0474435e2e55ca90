//! The end of the machine.
use std::path::Path;

use rustix::system::{RebootCommand, reboot};

/// Switches the machine off; never returns.
pub(super) fn off() -> ! {
    // Without ACPI the kernel would halt and hang there. A restart ends the machine too: the
    // monitor runs with -no-reboot.
    let preferred =
        if Path::new("/sys/firmware/acpi").exists() || !Path::new("/sys/firmware").exists() {
            RebootCommand::PowerOff
        } else {
            RebootCommand::Restart
        };
    for command in [preferred, RebootCommand::Restart, RebootCommand::Halt] {
        if let Err(error) = reboot(command) {
            super::console::say(format_args!("{command:?}: {error}"));
        }
    }
    // Only a kernel that refuses all three gets here; its panic about the end of init then ends the machine.
    std::process::abort()
}
