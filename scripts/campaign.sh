#!/usr/bin/env bash
# What finds rare things by repetition: the kill -9, power loss and fault cases on real machines and clients
# that come in the very moment in which their instance falls asleep or its memory is compressed, all of
# them where a test run takes a sample, and the property tests with more cases than a test run affords.
# Each round has a seed of its own, printed, which decides every random moment. The first failure ends it,
# with everything it printed.
#
#   campaign.sh [ROUNDS]        DOZE_E2E_SEED=N: seed of the first round; the next has N + 1
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
cd "$ROOT"
rounds=${1:-3}
[[ $rounds =~ ^[1-9][0-9]*$ ]] || die "ROUNDS is '$rounds'; it must be a number from 1 on"
first=${DOZE_E2E_SEED:-$RANDOM$RANDOM}
[[ $first =~ ^[0-9]+$ ]] || die "DOZE_E2E_SEED is '$first'; it must be a number"

say "property tests, $((rounds * 256)) cases each"
PROPTEST_CASES=$((rounds * 256)) cargo test --quiet --locked \
    -p doze-lifecycle -p doze-agent -p doze-image -p doze-api -p doze-host -p doze-engine

say "crashes and failures at every step of every operation, on machines that are played"
DOZE_CAMPAIGN_ROUNDS=$rounds cargo test --quiet --locked -p doze-engine --test inject -- --nocapture

cargo test --quiet --locked -p doze-e2e --no-run
runner=$(end_to_end_runner)
for ((round = 1; round <= rounds; round++)); do
    seed=$((first + round - 1))
    say "kill -9, power loss, faults and late clients, round $round of $rounds, seed $seed"
    as_root env DOZE_BIN="$TARGET/release/doze" DOZE_E2E_CAMPAIGN=1 DOZE_E2E_SEED="$seed" \
        "$runner" kill9 crash faults:: power-loss full-disk auto-standby-boundary compression
done
say "the billing example: 60 s running, 300 s asleep, 30 s running"
as_root env DOZE_BIN="$TARGET/release/doze" DOZE_E2E_BILLING=60,300,30 \
    "$runner" billing::the_billing_example
say "$rounds rounds passed"
