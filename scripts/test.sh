#!/usr/bin/env bash
# Everything that guards main, in the order in which it fails fastest. Prints how long each stage took
# and, last, one line with all tests that ran:  N passed, N failed, N skipped
# A stage that fails does not keep the later ones from running, unless they build on it.
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
cd "$ROOT"
# One build from scratch gains nothing from incremental artefacts, and writing them costs.
export CARGO_INCREMENTAL=${CARGO_INCREMENTAL:-0}

logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
failed_stages=()
timeline=()
passed=0 failed=0 skipped=0

# stage NAME COMMAND...: runs it, keeps its output for counting, remembers time and failure.
stage() {
    local name=$1 begin rc=0
    shift
    say "$name"
    begin=$(now_ms)
    "$@" 2>&1 | tee "$logs/$name" || rc=$?
    timeline+=("$(printf '%-12s %5d s  %s' "$name" $((($(now_ms) - begin) / 1000)) "$([ $rc -eq 0 ] && echo ok || echo FAILED)")")
    [ $rc -eq 0 ] || failed_stages+=("$name")
    return 0
}

# Adds up what a stage's runners reported: libtest's "test result" lines (the end-to-end runner prints
# the same) and nextest's "Summary" line.
count() {
    local p f s
    read -r p f s < <(sed 's/\x1b\[[0-9;]*m//g' "$logs/$1" | awk '
        /^test result: / {
            for (i = 1; i < NF; i++) {
                if ($(i+1) ~ /^passed/) p += $i
                if ($(i+1) ~ /^failed/) f += $i
                if ($(i+1) ~ /^(ignored|skipped)/) s += $i
            }
        }
        /^ *Summary \[/ {
            for (i = 1; i < NF; i++) {
                if ($(i+1) ~ /^passed/) p += $i
                if ($(i+1) ~ /^(failed|timed)/) f += $i
                if ($(i+1) ~ /^skipped/) s += $i
            }
        }
        END { print p+0, f+0, s+0 }')
    passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + s))
    if [ $((p + f)) -eq 0 ]; then
        note "$1: no test ran"
        failed_stages+=("$1 (no test ran)")
    fi
}

unit() {
    if cargo nextest --version >/dev/null 2>&1; then
        cargo nextest run --locked --workspace --exclude doze-e2e --no-fail-fast --status-level fail --final-status-level fail
    else
        cargo test --locked --workspace --exclude doze-e2e --no-fail-fast
    fi
}

# The release binary, as an operator would run it, on real monitors in namespaces of its own. Fails by
# itself when root, TUN, conntrack or QEMU is missing: a case that did not run proves nothing.
e2e() {
    # Built by whoever runs make, run as root: root often has no cargo.
    local runner
    cargo test --quiet --locked -p doze-e2e --no-run
    runner=$(end_to_end_runner)
    as_root env DOZE_BIN="$TARGET/release/doze" "$runner"
}

begin=$(now_ms)
scripts/setup.sh packages kernel sdk deny
stage lint scripts/lint.sh
scripts/setup.sh image
stage unit unit
count unit
stage build cargo build --quiet --release --locked -p doze
if [[ " ${failed_stages[*]} " != *" build "* ]]; then
    stage e2e e2e
    count e2e
fi

say "summary"
for line in "${timeline[@]}"; do note "$line"; done
note "all together $((($(now_ms) - begin) / 1000)) s"
if [ "$skipped" -gt 0 ]; then
    note "$skipped skipped: a test that did not run proves nothing, so this counts as failure"
    failed_stages+=(skipped)
fi
printf '%d tests ran: %d passed, %d failed, %d skipped\n' $((passed + failed)) "$passed" "$failed" "$skipped"
if [ ${#failed_stages[@]} -gt 0 ]; then
    die "failed: ${failed_stages[*]}"
fi
