# Shared by the scripts beside it (sourced, never run): where things are, how things are said.
# Everything fetched or built by set-up lives below .cache/, everything compiled below target/.
# shellcheck shell=bash

set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
CACHE=$ROOT/.cache
TARGET=${CARGO_TARGET_DIR:-$ROOT/target}
# Administrative programs (nft, ip, mke2fs) are in sbin, which an ordinary user's PATH lacks.
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
export PATH

# Released clients that the conformance tests drive, with the hashes of what the registries served
# when they were first looked at. Another hash under the same version is refused.
# shellcheck disable=SC2034  # used by setup.sh
{
    SDK_VERSION=0.28.0
    SDK_PY_SHA256=12743ccf96304d103b112f1a583630caf095e32d1be959c242609a9c729e7afc
    SDK_TS_INTEGRITY=sha512-KMhKkeKZiCgbDHBawMvTGYhaWrQHru3etTWWRumReNDdSXmlj6y+7jjxEI4v8nDB1iMIo/5wXrgfqrDZJNcNUw==
    CARGO_DENY_VERSION=0.20.2
}

say() { printf '\033[1m==>\033[0m %s\n' "$*"; }
note() { printf '    %s\n' "$*"; }
die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

have() { command -v "$1" >/dev/null 2>&1; }

# Runs its arguments as root: directly, through sudo, or not at all with the reason.
as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    elif have sudo; then
        sudo "$@"
    else
        die "'$*' needs root: run make as root, or install sudo"
    fi
}

# Wall clock in milliseconds.
now_ms() { date +%s%3N; }

# Path of the end-to-end runner, which must have been built (cargo test -p doze-e2e --no-run).
end_to_end_runner() {
    local runner
    runner=$(cargo test --quiet --locked -p doze-e2e --no-run --message-format=json |
        sed -n 's/.*"executable":"\([^"]*\/e2e-[^"]*\)".*/\1/p' | tail -n 1)
    [ -x "$runner" ] || die "cargo built no end-to-end runner"
    printf '%s\n' "$runner"
}
