#!/usr/bin/env bash
# Feeds what is read from artefacts with what nobody would write: SECONDS (default 600) for each target, one
# after the other, on one core. A panic, a wrong byte, more memory than is declared (fuzz_targets/budget.rs), or a
# single allocation beyond 64 MiB, C libraries included, ends it, and the input stays below
# crates/snapshot/fuzz/artifacts. Needs a nightly toolchain and
# cargo-fuzz (cargo install cargo-fuzz). What is found on the way is kept below target/; the corpus that is
# checked in grows only by hand (cargo +nightly fuzz cmin).
#
#   fuzz.sh [SECONDS [TARGET...]]
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
seconds=${1:-600}
[[ $seconds =~ ^[1-9][0-9]*$ ]] || die "SECONDS is '$seconds'; it must be a number from 1 on"
cargo +nightly fuzz --version >/dev/null 2>&1 ||
    die "this needs a nightly toolchain and cargo-fuzz: rustup toolchain install nightly && cargo install cargo-fuzz"
cd "$ROOT/crates/snapshot"
targets=("${@:2}")
[ ${#targets[@]} -gt 0 ] || mapfile -t targets < <(cargo +nightly fuzz list)
for target in "${targets[@]}"; do
    say "$target, $seconds s"
    found=$TARGET/fuzz/$target
    mkdir -p "$found"
    # New inputs go to the first folder; the second is only read.
    folders=("$found")
    [ ! -d "fuzz/corpus/$target" ] || folders+=("fuzz/corpus/$target")
    cargo +nightly fuzz run --target-dir "$TARGET/fuzz/build" "$target" "${folders[@]}" -- \
        -max_total_time="$seconds" -malloc_limit_mb=64 -rss_limit_mb=1024 -print_final_stats=1
done
