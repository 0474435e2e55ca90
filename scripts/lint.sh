#!/usr/bin/env bash
# Form and rules: formatting, lints, the direction of dependencies, and what may be depended on.
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
cd "$ROOT"
PATH=$PATH:$CACHE/tools/bin

say "rustfmt"
cargo fmt --all --check

say "clippy"
cargo clippy --quiet --locked --workspace --all-targets -- -D warnings

say "dependency direction"
cargo run --quiet --locked -p xtask -- check-deps

say "cargo-deny: bans, licences, sources"
# Duplicate versions are warnings by choice (deny.toml): a count here, the list by hand.
report=$(mktemp)
trap 'rm -f "$report"' EXIT
if ! cargo deny --all-features check bans licenses sources >"$report" 2>&1; then
    cat "$report" >&2
    die "cargo-deny refuses a dependency (deny.toml says what is allowed and why)"
fi
tail -n 1 "$report"

# The database is a Git repository on the network. Failing to reach it is no finding; a finding is.
say "cargo-deny: advisories"
if cargo deny --all-features check advisories >"$report" 2>&1; then
    tail -n 1 "$report"
elif grep -q 'failed to fetch advisory database' "$report"; then
    note "not checked, the database cannot be reached: $(sed -n 's/^fatal: //p' "$report" | head -n 1)"
else
    cat "$report" >&2
    die "cargo-deny found an advisory against a dependency"
fi
