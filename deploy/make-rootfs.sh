#!/bin/sh
# Lays out the files of the image: the program, the name of its user, places to mount things at, licences. Nothing else.
#
#   deploy/make-rootfs.sh BINARY DIRECTORY
#
# The directory must not exist yet. Modes do not depend on the umask.
set -eu

if [ $# -ne 2 ]; then
    echo "usage: make-rootfs.sh BINARY DIRECTORY" >&2
    exit 64
fi
binary=$1
root=$2
source=$(cd "$(dirname "$0")/.." && pwd -P)

# A dynamic program starts nowhere in an image without libraries, with a message about a missing file that is there.
if LC_ALL=C grep -q -a -e '/ld-linux' -e '/ld64' "$binary"; then
    echo "make-rootfs: $binary wants a dynamic loader; build it with deploy/build-static.sh" >&2
    exit 1
fi

umask 022
mkdir -m 0755 "$root"
mkdir -m 0755 "$root/etc" "$root/etc/vsock-sidecar" "$root/run" "$root/licenses"
# For `demo`, and for whoever runs the image without a volume here. Any user may write, as any user may run the program.
mkdir -m 1777 "$root/tmp" "$root/run/vsock-sidecar" "$root/run/vsock-sidecar-admin"
# Names for ids, for those who look; no shell, no password, no home.
echo 'vsock-sidecar:x:65532:65532::/:/sbin/nologin' >"$root/etc/passwd"
echo 'vsock-sidecar:x:65532:' >"$root/etc/group"
install -m 0644 "$source/LICENSE-APACHE" "$source/LICENSE-MIT" "$root/licenses"
install -m 0555 "$binary" "$root/vsock-sidecar"
