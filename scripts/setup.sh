#!/usr/bin/env bash
# Brings a Debian machine with Rust to where doze can be built, run and tested. Run again at will: a
# step whose result is there does nothing.
#
#   setup.sh [packages] [kernel] [image] [sdk] [deny]      default: all but deny
#
# Each result appears under its final name in one rename, so an interrupted set-up leaves nothing that
# looks finished.
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

# What a program is called, and the Debian package that has it. Asked for by program, because some
# machines have them from elsewhere (a Node.js from its vendor brings its own npm).
PROGRAMS="
qemu-system-x86_64:qemu-system-x86
mkfs.erofs:erofs-utils
mke2fs:e2fsprogs
xfs_io:xfsprogs
nft:nftables
ip:iproute2
conntrack:conntrack
cc:gcc
make:make
python3:python3-venv
node:nodejs
npm:npm
zstd:zstd
lz4:lz4
"

apt_fresh=no
# Package lists as old as a year-old disk image lead to files that are gone; as a last resort only,
# because it takes longer than everything else here.
apt_refresh() {
    [ "$apt_fresh" = no ] || return 1
    note "refreshing the package lists"
    as_root apt-get update -qq
    apt_fresh=yes
}

apt_install() {
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >"$CACHE/apt.log" 2>&1
}

packages() {
    local missing=() entry
    for entry in $PROGRAMS; do
        have "${entry%%:*}" || missing+=("${entry##*:}")
    done
    # Images made by the end-to-end cases hold it and nothing else, so it must need no library.
    if ! have busybox || ldd "$(command -v busybox)" >/dev/null 2>&1; then missing+=(busybox-static); fi
    [ -e /usr/include/stdlib.h ] || missing+=(libc6-dev)
    # The module may be there and its bootstrap not: Debian splits them.
    { have python3 && system_python -c 'import ensurepip, venv' 2>/dev/null; } || missing+=(python3-venv)
    if [ ${#missing[@]} -eq 0 ]; then
        note "packages: all there"
        return
    fi
    have apt-get || die "missing: ${missing[*]}; this is not a Debian system, install them by hand"
    say "installing ${missing[*]}"
    if ! apt_install "${missing[@]}"; then
        apt_refresh && apt_install "${missing[@]}" || {
            cat "$CACHE/apt.log" >&2
            die "apt could not install: ${missing[*]}"
        }
    fi
}

# Debian's own Python, whatever else is first in PATH.
system_python() {
    if [ -x /usr/bin/python3 ]; then /usr/bin/python3 "$@"; else python3 "$@"; fi
}

# The package that the meta package stands for today, for example linux-image-6.1.0-56-cloud-amd64.
kernel_package() {
    apt-cache show --no-all-versions linux-image-cloud-amd64 2>/dev/null |
        sed -n 's/^Depends: *\(linux-image-[^ ,]*\).*/\1/p' | head -n 1
}

# apt checks the file against the signed package lists; nothing is installed on the host.
kernel() {
    if [ -e "$CACHE/kernel/boot/vmlinuz" ] && [ -d "$CACHE/kernel/modules/kernel" ]; then
        note "kernel: $(cat "$CACHE/kernel/version")"
        return
    fi
    local stage package version
    stage=$(mktemp -d "$CACHE/kernel.XXXXXX")
    # shellcheck disable=SC2064  # the folder's name as it is now
    trap "rm -rf '$stage'" EXIT
    package=$(kernel_package)
    if [ -z "$package" ]; then
        apt_refresh || true
        package=$(kernel_package)
    fi
    [ -n "$package" ] || die "apt knows no linux-image-cloud-amd64; is this Debian on amd64?"
    say "fetching the guest's kernel ($package)"
    if ! apt_download "$stage" "$package"; then
        apt_refresh || true
        package=$(kernel_package)
        apt_download "$stage" "$package" || {
            cat "$CACHE/apt.log" >&2
            die "apt could not download $package"
        }
    fi
    mkdir "$stage/x" "$stage/out" "$stage/out/boot"
    dpkg-deb -x "$stage"/*.deb "$stage/x"
    version=$(basename "$stage"/x/lib/modules/*)
    mv "$stage/x/boot/vmlinuz-$version" "$stage/out/boot/vmlinuz"
    mv "$stage/x/lib/modules/$version" "$stage/out/modules"
    chmod 0644 "$stage/out/boot/vmlinuz"
    printf '%s\n' "$version" >"$stage/out/version"
    rm -rf "$CACHE/kernel"
    mv -T "$stage/out" "$CACHE/kernel"
    rm -rf "$stage"
    trap - EXIT
    note "kernel: $version"
}

# `apt-get download` drops to the user _apt, who cannot write into our stage folder and does not have to.
apt_download() {
    (cd "$1" && apt-get -o APT::Sandbox::User=root download -qq "$2") >"$CACHE/apt.log" 2>&1
}

image() {
    if [ -e "$CACHE/demo-image/index.json" ]; then
        note "demo image: there"
        return
    fi
    say "making the demo image (busybox and redis from Debian packages)"
    if ! have_candidate redis-server; then apt_refresh || true; fi
    cargo run --quiet --locked --manifest-path "$ROOT/Cargo.toml" -p xtask -- demo-image --out "$CACHE/demo-image"
}

have_candidate() {
    apt-cache show --no-all-versions "$1" >/dev/null 2>&1
}

# The released clients, unmodified, from their registries.
sdk() {
    mkdir -p "$CACHE/sdk"
    sdk_python
    sdk_typescript
}

sdk_python() {
    local dir=$CACHE/sdk/py got
    if [ ! -e "$dir/.installed-$SDK_VERSION" ]; then
        say "installing the Python client (hypeman $SDK_VERSION)"
        rm -rf "$dir"
        system_python -m venv "$dir"
        "$dir/bin/python" -m pip install --quiet --disable-pip-version-check \
            --report "$dir/report.json" "hypeman==$SDK_VERSION"
        got=$("$dir/bin/python" - "$dir/report.json" <<'PY'
import json, sys
for item in json.load(open(sys.argv[1]))["install"]:
    if item["metadata"]["name"] == "hypeman":
        print(item["download_info"]["archive_info"]["hash"].replace("sha256=", ""))
PY
)
        [ "$got" = "$SDK_PY_SHA256" ] || die "hypeman $SDK_VERSION from PyPI has sha256 $got, expected $SDK_PY_SHA256"
        printf '%s\n' "sha256:$got" >"$dir/integrity"
        touch "$dir/.installed-$SDK_VERSION"
    fi
    note "Python client: hypeman $SDK_VERSION $(cat "$dir/integrity")"
}

sdk_typescript() {
    local dir=$CACHE/sdk/ts got
    if [ ! -e "$dir/.installed-$SDK_VERSION" ]; then
        say "installing the TypeScript client (@onkernel/hypeman $SDK_VERSION)"
        rm -rf "$dir"
        mkdir -p "$dir"
        printf '%s\n' '{"name": "doze-sdk-tests", "private": true}' >"$dir/package.json"
        # Its dependencies' install scripts have no business here.
        npm install --prefix "$dir" --silent --no-audit --no-fund --ignore-scripts --save-exact "@onkernel/hypeman@$SDK_VERSION"
        got=$(node -p "require('$dir/package-lock.json').packages['node_modules/@onkernel/hypeman'].integrity")
        [ "$got" = "$SDK_TS_INTEGRITY" ] || die "@onkernel/hypeman $SDK_VERSION from npm has integrity $got, expected $SDK_TS_INTEGRITY"
        printf '%s\n' "$got" >"$dir/integrity"
        touch "$dir/.installed-$SDK_VERSION"
    fi
    note "TypeScript client: @onkernel/hypeman $SDK_VERSION $(cat "$dir/integrity")"
}

# Built without optimisation: it runs for a second, and building it optimised takes minutes.
deny() {
    if have cargo-deny || [ -x "$CACHE/tools/bin/cargo-deny" ]; then
        note "cargo-deny: there"
        return
    fi
    say "building cargo-deny $CARGO_DENY_VERSION (once, about a minute on two cores)"
    CARGO_PROFILE_RELEASE_OPT_LEVEL=0 CARGO_PROFILE_RELEASE_LTO=off CARGO_PROFILE_RELEASE_CODEGEN_UNITS=16 \
        CARGO_PROFILE_RELEASE_DEBUG=false CARGO_PROFILE_RELEASE_STRIP=true \
        CARGO_TARGET_DIR="$CACHE/tools/target" \
        cargo install --quiet --locked --version "$CARGO_DENY_VERSION" --root "$CACHE/tools" cargo-deny
    rm -rf "$CACHE/tools/target"
}

mkdir -p "$CACHE"
say "set-up"
have cargo || die "cargo is missing: install Rust (https://rustup.rs), then run this again"
[ $# -gt 0 ] || set -- packages kernel image sdk
for step in "$@"; do
    case $step in
        packages | kernel | image | sdk | deny) "$step" ;;
        *) die "unknown step '$step'; there are: packages kernel image sdk deny" ;;
    esac
done
