//! `/init` of the initramfs.
fn main() {
    if std::process::id() != 1 {
        eprintln!(
            "doze-guest is the init of a doze guest; it runs as process 1 of a virtual machine only"
        );
        std::process::exit(2);
    }
    doze_guest::init::run()
}
