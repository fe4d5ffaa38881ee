#!/bin/sh
# Installs what runs arm64 artifacts on another processor: qemu's user mode and the cross C and C++ libraries.
# Exit status 0 when they are there in the end; otherwise 1, and one line that says why.
set -eu

packages="qemu-user-static libc6-arm64-cross libstdc++6-arm64-cross"

present() {
    command -v qemu-aarch64-static >/dev/null && [ -e /usr/aarch64-linux-gnu/lib/libstdc++.so.6 ]
}

fail() {
    echo "setup_qemu: $1; tests under qemu are skipped" >&2
    exit 1
}

if [ "$(uname -m)" = aarch64 ]; then
    echo "setup_qemu: this processor runs arm64 artifacts itself"
    exit 0
fi
if present; then
    echo "setup_qemu: already installed"
    exit 0
fi
command -v apt-get >/dev/null || fail "found no apt-get; install qemu-user and a cross C library for aarch64 by hand"
[ "$(id -u)" -eq 0 ] || fail "not root; run 'sudo apt-get install $packages'"

export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# shellcheck disable=SC2086  # the list is meant to be split
if ! { apt-get update && apt-get install --yes --no-install-recommends $packages; } >"$log" 2>&1; then
    fail "apt-get failed: $(grep -m1 '^E:' "$log" || tail -n1 "$log")"
fi
present || fail "installed $packages, but qemu-aarch64-static or its libraries are not where they belong"
echo "setup_qemu: installed $packages"
