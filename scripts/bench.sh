#!/usr/bin/env bash
# Boot time and the server's footprint, measured by the end-to-end framework on the release binary; connection
# tracking; the memory codec beside the zstd and lz4 tools.
#
#   bench.sh [PART...]          PART: server, conntrack, codec; all without
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
cd "$ROOT"
parts=("$@")
[ $# -gt 0 ] || parts=(server conntrack codec)
for part in "${parts[@]}"; do
    [[ $part =~ ^(server|conntrack|codec)$ ]] || die "'$part' is no part; there are server, conntrack and codec"
done
# Built by whoever runs make, run as root: root often has no cargo.
cargo build --release --locked -p doze-e2e --bin bench
cargo build --release --locked -p doze-host --example conntrack
cargo build --release --locked -p doze-snapshot --example codec

server() {
    as_root env DOZE_BIN="$TARGET/release/doze" "$TARGET/release/bench"
}

conntrack() {
    # In a network namespace of its own, where nobody else has connections.
    printf '\nConnection tracking, 200,000 flows:\n\n'
    as_root unshare --net "$TARGET/release/examples/conntrack" 200000
}

# 8 GiB of space: the inputs, and a result or two.
codec() {
    local folder
    folder=$(mktemp -d "${DOZE_BENCH_DIR:-/tmp}/doze-bench-XXXXXX")
    # shellcheck disable=SC2064  # the folder of now
    trap "as_root rm -rf '$folder'" EXIT
    printf '\nThe memory codec, beside %s and %s:\n\n' "$(zstd -V)" "$(lz4 -V)"
    as_root env DOZE_BIN="$TARGET/release/doze" "$TARGET/release/bench" codec-inputs "$folder"
    as_root "$TARGET/release/examples/codec" "$folder"
}

for part in "${parts[@]}"; do
    "$part"
done
