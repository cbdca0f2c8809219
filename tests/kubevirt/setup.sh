#!/bin/sh
# Installs what the tests of KubeVirt's domains use: libvirt with its schema and its QEMU driver, and xmllint. For Debian and Ubuntu, as
# root. No daemon is started: the tests run libvirt's driver in a process of their own. Does nothing if everything is there.
set -eu

missing=
need() { command -v "$1" >/dev/null 2>&1 || missing="$missing $2"; }
need xmllint libxml2-utils
# virt-qemu-run comes with the driver, and the schema with the library that the driver needs.
need virt-qemu-run libvirt-daemon-driver-qemu

sudo=
if [ "$(id -u)" -ne 0 ]; then sudo=sudo; fi

if [ -n "$missing" ]; then
    command -v apt-get >/dev/null 2>&1 || {
        echo "setup: please install:$missing (this script knows apt-get only)" >&2
        exit 1
    }
    echo "setup: installing$missing"
    $sudo apt-get update -qq
    # shellcheck disable=SC2086 # a list of words
    $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
fi

# The driver looks its default user up before it reads that another one is wanted.
if ! getent passwd libvirt-qemu >/dev/null; then
    $sudo useradd --system --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin libvirt-qemu
fi
