#!/bin/sh
# Builds the image with buildah: no daemon, no root file system to pull, no network once the crates are fetched.
#
#   deploy/build-image.sh [--binary FILE] [--tag NAME] [--output FILE]
#
#   --binary FILE   a static program that exists already; else deploy/build-static.sh builds one
#   --tag NAME      what the image is called: localhost/vsock-sidecar:VERSION unless given
#   --output FILE   writes it as an OCI archive too
#
# Prints the digest of the image. It is the same for the same program, version and revision: files carry SOURCE_DATE_EPOCH (0) as time.
# Where images are stored is buildah's to say (--root, storage.conf), and what its arguments are BUILDAH_ARGUMENTS's.
set -eu

source=$(cd "$(dirname "$0")/.." && pwd -P)
version=$(sed -n 's/^version = "\(.*\)"/\1/p' "$source/Cargo.toml" | head -n 1)
binary=
tag=localhost/vsock-sidecar:$version
output=
while [ $# -gt 0 ]; do
    case "$1" in
    --binary | --tag | --output)
        [ $# -ge 2 ] || {
            echo "build-image: $1 wants a value" >&2
            exit 64
        }
        case "$1" in
        --binary) binary=$2 ;;
        --tag) tag=$2 ;;
        --output) output=$2 ;;
        esac
        shift 2
        ;;
    *)
        echo "usage: build-image.sh [--binary FILE] [--tag NAME] [--output FILE]" >&2
        exit 64
        ;;
    esac
done
command -v buildah >/dev/null 2>&1 || {
    echo "build-image: buildah is missing; tests/kubernetes/image-tools.sh installs it on Debian and Ubuntu" >&2
    exit 1
}
[ -n "$binary" ] || binary=$("$source/deploy/build-static.sh")
revision=${VSOCK_SIDECAR_REVISION:-$(git -C "$source" rev-parse --short=12 HEAD 2>/dev/null || echo unknown)}

context=$(mktemp -d)
trap 'rm -rf "$context"' EXIT
"$source/deploy/make-rootfs.sh" "$binary" "$context/rootfs"

# vfs needs no kernel support and chroot no runtime: both work in a container of a CI.
# shellcheck disable=SC2086 # a list of words
storage="--storage-driver vfs ${BUILDAH_ARGUMENTS-}"
# shellcheck disable=SC2086
buildah $storage build --quiet --isolation chroot --no-cache --format oci --timestamp "${SOURCE_DATE_EPOCH:-0}" \
    --build-arg VERSION="$version" --build-arg REVISION="$revision" \
    --file "$source/deploy/Dockerfile.prebuilt" --tag "$tag" "$context" >&2
if [ -n "$output" ]; then
    # shellcheck disable=SC2086
    buildah $storage push --quiet "$tag" "oci-archive:$output" >&2
fi
# shellcheck disable=SC2086
buildah $storage inspect --type image --format '{{.FromImageDigest}}' "$tag"
