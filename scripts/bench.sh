#!/usr/bin/env bash
# Boot time and the server's footprint, measured by the end-to-end framework on the release binary.
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
cd "$ROOT"
# Built by whoever runs make, run as root: root often has no cargo.
cargo build --release --locked -p doze-e2e --bin bench
cargo build --release --locked -p doze-host --example conntrack
as_root env DOZE_BIN="$TARGET/release/doze" "$TARGET/release/bench"
# In a network namespace of its own, where nobody else has connections.
printf '\nConnection tracking, 200,000 flows:\n\n'
as_root unshare --net "$TARGET/release/examples/conntrack" 200000
