#!/usr/bin/env bash
# One instance's life, on a private server: own network namespace, own folder, own port. The host's
# network is not touched, and nothing is left running, however this ends.
#
#   DOZE_DEMO_MONITOR=qemu   the other QEMU machine type (default qemu-microvm)
#   DOZE_DEMO_KEEP=1         leave the folder behind to be looked at
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
cd "$ROOT"

if [ "$(id -u)" -ne 0 ]; then
    have sudo || die "the demo makes a network namespace and TAP devices: run make as root, or install sudo"
    exec sudo env "CARGO_TARGET_DIR=$TARGET" "DOZE_DEMO_MONITOR=${DOZE_DEMO_MONITOR:-}" "DOZE_DEMO_KEEP=${DOZE_DEMO_KEEP:-}" "$0"
fi

DOZE=$TARGET/release/doze
MONITOR=${DOZE_DEMO_MONITOR:-qemu-microvm}
NETNS=doze-demo-$$
PORT=4973 # our own namespace: no port of the host's can be in the way
HOME_DIR=
SERVER=
begin=$(now_ms)

# Runs on every way out. Kills what it knows by pid: the server, then whatever else lives in the
# namespace that this script made (a VMM outlives its server on purpose).
cleanup() {
    local status=$? pid
    trap - EXIT INT TERM HUP
    if [ $status -ne 0 ] && [ -n "$HOME_DIR" ] && [ -e "$HOME_DIR/server.log" ]; then
        printf '\n--- end of the server log\n' >&2
        tail -n 25 "$HOME_DIR/server.log" >&2
    fi
    if [ -n "$SERVER" ] && kill -TERM "$SERVER" 2>/dev/null; then
        wait "$SERVER" 2>/dev/null || true
    fi
    if [ -e "/run/netns/$NETNS" ]; then
        for pid in $(ip netns pids "$NETNS"); do
            printf 'stopping pid %s, which was still there\n' "$pid" >&2
            kill -KILL "$pid" 2>/dev/null || true
            [ $status -ne 0 ] || status=1
        done
        ip netns delete "$NETNS"
    fi
    if [ -n "$HOME_DIR" ]; then
        if [ -n "${DOZE_DEMO_KEEP:-}" ]; then note "kept $HOME_DIR"; else rm -rf "$HOME_DIR"; fi
    fi
    exit $status
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# step TEXT COMMAND...: what is done, its output indented, and how long it took.
step() {
    local text=$1 from to output rc=0
    shift
    from=$(now_ms)
    printf '\n\033[1m%6d ms  %s\033[0m\n' $((from - begin)) "$text"
    [ "$1" != doze ] || printf '           $ %s\n' "$(shown "$@")"
    # Not through a pipe that would hide the exit status.
    output=$("$@" 2>&1) || rc=$?
    to=$(now_ms)
    [ -z "$output" ] || printf '%s\n' "$output" | sed 's/^/           /'
    if [ $rc -ne 0 ]; then die "that failed with exit status $rc"; fi
    printf '           (%d ms)\n' $((to - from))
    last=$output
}

# The command as a person would type it.
shown() {
    local word
    for word in "$@"; do
        if [[ $word =~ [^A-Za-z0-9_./:=-] ]]; then printf "'%s' " "$word"; else printf '%s ' "$word"; fi
    done
}

doze() { ip netns exec "$NETNS" "$DOZE" "$@"; }

for needed in "$DOZE" "$CACHE/kernel/boot/vmlinuz" "$CACHE/demo-image/index.json"; do
    [ -e "$needed" ] || die "$needed is missing: run make demo, which makes it"
done
HOME_DIR=$(mktemp -d "${TMPDIR:-/tmp}/doze-demo.XXXXXX")
ip netns add "$NETNS"
ip -n "$NETNS" link set lo up

cat >"$HOME_DIR/doze.toml" <<TOML
data_dir = "$HOME_DIR/data"
listen = "127.0.0.1:$PORT"

[hypervisor]
default = "$MONITOR"

[kernel]
image = "$CACHE/kernel/boot/vmlinuz"
modules = "$CACHE/kernel/modules"

[network]
bridge = "dozedemo"
subnet = "10.77.0.0/24"
TOML
export DOZE_CONFIG=$HOME_DIR/doze.toml

say "$(uname -m), $(nproc) cores, monitor $MONITOR, server in network namespace $NETNS"
ip netns exec "$NETNS" "$DOZE" serve --config "$HOME_DIR/doze.toml" >"$HOME_DIR/server.log" 2>&1 &
SERVER=$!

ready() {
    local tries=0
    until doze ps >/dev/null 2>&1; do
        kill -0 "$SERVER" 2>/dev/null || die "the server ended"
        tries=$((tries + 1))
        [ $tries -lt 100 ] || die "the server does not answer"
        sleep 0.1
    done
    printf 'http://127.0.0.1:%s answers\n' "$PORT"
}

step "a private server: doze serve --config doze.toml" ready
step "import an OCI layout" doze image import demo "$CACHE/demo-image"
step "run it as a microVM" doze run -d --name demo --memory 256MB --overlay 1GB demo
step "it is there" doze ps
step "a guest of its own: kernel and memory" doze exec demo -- sh -c 'uname -a; free -m'
# Running means that the program has started, not that it listens yet.
step "its redis answers" \
    doze exec --timeout 30 demo -- sh -c 'until redis-cli ping 2>/dev/null; do sleep 0.1; done'
step "what its program says" doze logs --tail 3 demo
step "write to its disk, and to its redis" \
    doze exec demo -- sh -c 'echo "written before the stop" > note; redis-cli SET greeting hello'
step "a value only its memory knows" \
    doze exec demo -- sh -c 'echo "kept in memory" > /dev/shm/dream; df -h /dev/shm'
step "standby: no CPU, no RAM, its memory is a file" doze standby demo
[ -z "$(ip netns pids "$NETNS" | grep -vx "$SERVER" || true)" ] || die "a sleeping instance has a process"
step "asleep" doze ps
step "restore: it goes on where it was" doze restore demo
step "nothing is forgotten" doze exec demo -- sh -c 'cat /dev/shm/dream; redis-cli GET greeting'
[[ $last == *"kept in memory"* ]] || die "its memory is gone"
step "stop: no CPU, no memory, only files" doze stop demo
step "start again" doze start demo
step "its disk is as it was" doze exec --timeout 30 demo -- sh -c \
    'cat note; until redis-cli ping >/dev/null 2>&1; do sleep 0.1; done; redis-cli GET greeting'
[[ $last == *"written before the stop"* && $last == *hello* ]] || die "the data is gone"
step "time in every phase, for the bill" doze phases demo
step "delete it" doze rm -f demo
step "nothing is left" doze ps -a
[[ $last != *demo* ]] || die "the instance is still listed"

left=$(ip netns pids "$NETNS" | grep -vx "$SERVER" || true)
[ -z "$left" ] || die "processes are left: $left"
taps=$(ip -n "$NETNS" -o link show type tun | wc -l)
[ "$taps" -eq 0 ] || die "$taps TAP devices are left"
printf '\n'
say "demo finished after $(($(now_ms) - begin)) ms; no process, TAP or file of it is left"
