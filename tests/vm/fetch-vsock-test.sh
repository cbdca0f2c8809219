#!/bin/sh
# Fetches and builds Linux's own tests of vsock: tools/testing/vsock of the kernel's source.
#
#   fetch-vsock-test.sh [DIR VERSION]
#
# DIR is `vm` in cargo's target directory and VERSION is 6.12 unless given otherwise. It leaves
#   DIR/vsock-test/vsock_test, vsock_diag_test, vsock_uring_test, vsock_perf    static programs
#   DIR/vsock-test/release                                                      the package and its version; written last
#
# The source is Debian's package linux-source-VERSION, of which only these programs and what they include are unpacked, and
# liburing-dev is taken out of its package; nothing is installed from either. What is there is kept, so a second run costs
# nothing and needs no network. A package file put into DIR/debs is preferred to the system's package sources.
set -eu

me=fetch-vsock-test
. "$(dirname "$0")/apt.sh"

[ $# -gt 0 ] || set -- "${CARGO_TARGET_DIR:-$(dirname "$0")/../../target}/vm" 6.12
[ $# -eq 2 ] || fail "usage: fetch-vsock-test.sh [DIR VERSION]"
mkdir -p "$1"
dir=$(cd "$1" && pwd)
version=$2
alone "$dir" "$version"

dest=$dir/vsock-test
programs="vsock_test vsock_diag_test vsock_uring_test vsock_perf"
case $(cat "$dest/release" 2>/dev/null) in
linux-source-"$version"_*) exit 0 ;;
esac
need make make cc gcc xz xz-utils

work=$dir/.work-vsock-test
rm -rf "$work" "$dest"
mkdir -p "$work/debs" "$work/root" "$work/out"

obtain() { # PACKAGE
    for deb in "$dir"/debs/"$1"_*.deb; do
        [ -f "$deb" ] || continue
        cp "$deb" "$work/debs/"
        return 0
    done
    echo "$me: $1" >&2
    fetch "$work/debs" "$1" || {
        update_lists
        fetch "$work/debs" "$1"
    } || fail "could not download $1, which Debian has; put such a package file into $dir/debs and run this again"
}
obtain "linux-source-$version"
obtain liburing-dev

dpkg-deb --fsys-tarfile "$work"/debs/liburing-dev_*.deb | tar -x -C "$work/root"
# An archive in the package: neither is written out whole.
dpkg-deb --fsys-tarfile "$work"/debs/linux-source-*.deb | tar -xO --wildcards "*/linux-source-$version.tar.xz" | xz -dc |
    tar -x -C "$work/root" --strip-components=1 --wildcards \
        '*/tools/testing/vsock' '*/tools/include' '*/include/uapi/linux/vm_sockets*.h'

# Its Makefile looks for the kernel's interface in usr/include, where `make headers` would put it: what the programs name
# may be newer than what this system's own headers know.
mkdir -p "$work/root/usr/include/linux"
cp "$work"/root/include/uapi/linux/vm_sockets*.h "$work/root/usr/include/linux/"
# shellcheck disable=SC2086 # a list of words
LIBRARY_PATH=$(dirname "$(find "$work/root/usr/lib" -name liburing.a)") \
    make -s -C "$work/root/tools/testing/vsock" LDFLAGS="-static -s" $programs >&2 || fail "could not build $programs"
for program in $programs; do
    cp "$work/root/tools/testing/vsock/$program" "$work/out/"
done
basename "$work"/debs/linux-source-*.deb _all.deb | sed 's/%3a/:/' >"$work/release"
mv "$work/out" "$dest"
mv "$work/release" "$dest/release"
rm -rf "$work"
