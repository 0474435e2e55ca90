#!/usr/bin/env bash
# Boot time and the server's footprint, measured by the end-to-end framework on the release binary.
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
cd "$ROOT"
# Built by whoever runs make, run as root: root often has no cargo.
cargo build --release --locked -p doze-e2e --bin bench
as_root env DOZE_BIN="$TARGET/release/doze" "$TARGET/release/bench"
