#!/usr/bin/env bash
# What finds rare things by repetition: the kill -9 cases on real machines, and the property tests and
# injected crashes with more cases than a test run affords. The first failure ends it, with everything it printed.
#
#   campaign.sh [ROUNDS]
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
cd "$ROOT"
rounds=${1:-20}
[[ $rounds =~ ^[1-9][0-9]*$ ]] || die "ROUNDS is '$rounds'; it must be a number from 1 on"

say "property tests, $((rounds * 256)) cases each"
PROPTEST_CASES=$((rounds * 256)) cargo test --quiet --locked \
    -p doze-lifecycle -p doze-agent -p doze-image -p doze-api -p doze-host -p doze-engine

say "crashes and failures at every step of every operation, on machines that are played"
DOZE_CAMPAIGN_ROUNDS=$rounds cargo test --quiet --locked -p doze-engine --test inject -- --nocapture

cargo test --quiet --locked -p doze-e2e --no-run
runner=$(end_to_end_runner)
for ((round = 1; round <= rounds; round++)); do
    say "kill -9, round $round of $rounds"
    as_root env DOZE_BIN="$TARGET/release/doze" "$runner" crash
done
say "$rounds rounds passed"
