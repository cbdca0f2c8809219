#!/bin/sh
# Installs what the tests use besides Rust: QEMU and tools to make a guest, guest kernels, Linux's own tests, promtool and Prometheus, tshark, Chromium.
# For Debian and Ubuntu. Does nothing if everything is there. Run again at will.
set -eu

missing=
need() { command -v "$1" >/dev/null 2>&1 || missing="$missing $2"; }
need qemu-system-x86_64 qemu-system-x86
need cpio cpio
need depmod kmod
need xz xz-utils
need make make
need cc gcc
need promtool prometheus
need tshark tshark
# Any of its names will do.
command -v chromium-browser >/dev/null 2>&1 || command -v google-chrome >/dev/null 2>&1 || need chromium chromium

if [ -n "$missing" ]; then
    if ! command -v apt-get >/dev/null 2>&1; then
        echo "setup: please install:$missing (this script knows apt-get only)" >&2
        exit 1
    fi
    sudo=
    if [ "$(id -u)" -ne 0 ]; then
        sudo=sudo
        command -v sudo >/dev/null 2>&1 || {
            echo "setup: please install as root:$missing" >&2
            exit 1
        }
    fi
    echo "setup: installing$missing"
    $sudo apt-get update -qq
    # Packages that ask (tshark does) must not wait for an answer. (sudo lets no variable through.)
    # shellcheck disable=SC2086 # a list of words
    $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
fi

sh "$(dirname "$0")/vm/fetch-kernels.sh"
sh "$(dirname "$0")/vm/fetch-vsock-test.sh"
sh "$(dirname "$0")/kubernetes/tools.sh"
sh "$(dirname "$0")/kubevirt/setup.sh"
sh "$(dirname "$0")/kubernetes/image-tools.sh"
