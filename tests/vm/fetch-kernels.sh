#!/bin/sh
# Fetches the guest kernels of the real guest test and of `demo --vm`, and the programs that these need.
#
#   fetch-kernels.sh [DIR VERSION...]
#
# DIR is `vm` in cargo's target directory and the VERSIONs are 6.1 and 6.12 unless given otherwise.
# For each VERSION it leaves
#   DIR/VERSION/vmlinux            the kernel, uncompressed, to be entered as an ELF file (PVH)
#   DIR/VERSION/modules/NN-*.ko    the modules a vsock guest needs, uncompressed, to be loaded in the order of NN
#   DIR/VERSION/release            the kernel's release; written last, so its presence means that the rest is whole
#
# The kernels are Debian's cloud kernels, taken out of their packages; nothing is installed from them. What is there is
# kept, so a second run costs nothing and needs no network. A package file put into DIR/debs is preferred to the
# system's package sources, which is the way for systems that have only one of the kernels, or none.
# Programs that are missing are installed when this runs as root, and named otherwise, or if FETCH_KERNELS_INSTALL=no.
set -eu

# What is loaded at boot, in this order; what these need comes by modules.dep. Built-in ones are left out by themselves,
# and so is one with a question mark where the kernel has none: Debian's 6.1 knows no virtio-iommu.
wanted="virtio_pci virtio_iommu? vmw_vsock_virtio_transport"

fail() {
    echo "fetch-kernels: $*" >&2
    exit 1
}

[ $# -gt 0 ] || set -- "${CARGO_TARGET_DIR:-$(dirname "$0")/../../target}/vm" 6.1 6.12
[ $# -ge 2 ] || fail "usage: fetch-kernels.sh [DIR VERSION...]"
mkdir -p "$1"
dir=$(cd "$1" && pwd)
shift

[ "$(uname -m)" = x86_64 ] || fail "the guest is x86-64 and its test program is built here: this machine is $(uname -m)"

# Tests of several files may ask at once.
if command -v flock >/dev/null && [ "${FETCH_KERNELS_LOCKED:-}" != "$dir" ]; then
    FETCH_KERNELS_LOCKED=$dir exec flock "$dir/lock" sh "$0" "$dir" "$@"
fi

PATH=$PATH:/usr/sbin:/sbin

updated=
update_lists() {
    [ -z "$updated" ] || return 0
    updated=yes
    [ "$(id -u)" = 0 ] || return 0
    echo "fetch-kernels: apt-get update" >&2
    apt-get -qq update >&2 || echo "fetch-kernels: apt-get update failed; going on with the lists at hand" >&2
}

# need PROGRAM PACKAGE...: installs the packages whose program is missing.
need() {
    missing=
    while [ $# -ge 2 ]; do
        command -v "$1" >/dev/null || missing="$missing $2"
        shift 2
    done
    [ -n "$missing" ] || return 0
    command -v apt-get >/dev/null || fail "install what Debian calls$missing, then run this again"
    [ "$(id -u)" = 0 ] && [ "${FETCH_KERNELS_INSTALL:-yes}" != no ] || fail "missing programs; run: sudo apt-get install --no-install-recommends$missing"
    update_lists
    echo "fetch-kernels: apt-get install$missing" >&2
    # shellcheck disable=SC2086 # a list of package names
    DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends $missing >&2 ||
        fail "could not install$missing"
}

# The packages that hold kernel $1: Debian's cloud kernel, or else (Ubuntu has no such packages) the distribution's own.
packages_of() {
    for meta in linux-image-cloud-amd64 "linux-image-$1-cloud-amd64"; do
        apt-cache depends "$meta" 2>/dev/null
    done | sed -n "s/^ *Depends: \(linux-image-$1\.[^ ]*-cloud-amd64\)\$/\1/p" | sort -V | tail -n 1 | grep . && return
    apt-cache pkgnames "linux-image-$1." | grep -e '-cloud-amd64$' | sort -V | tail -n 1 | grep . && return
    image=$(apt-cache depends linux-image-virtual 2>/dev/null |
        sed -n 's/^ *Depends: \(linux-image-[0-9][^ ]*-generic\)$/\1/p' | sort -V | tail -n 1)
    [ -n "$image" ] || return 1
    echo "$image linux-modules-${image#linux-image-}"
}

download() { # VERSION INTO
    version=$1 into=$2
    mkdir -p "$into"
    for deb in "$dir"/debs/linux-image-"$version".*.deb; do
        [ -f "$deb" ] || continue
        cp "$deb" "$into/"
        return 0
    done
    packages=$(packages_of "$version") || {
        update_lists
        packages=$(packages_of "$version")
    } || fail "no package with a Linux $version kernel in this system's package sources." \
        "Debian 12 has linux-image-cloud-amd64 (6.1) and linux-image-6.12-cloud-amd64;" \
        "elsewhere put such a package file into $dir/debs and run this again"
    echo "fetch-kernels: Linux $version from $packages" >&2
    # shellcheck disable=SC2086 # a list of package names
    fetch="apt-get -qq -o APT::Sandbox::User=$(id -un) download $packages"
    (cd "$into" && $fetch >&2) || {
        update_lists
        packages=$(packages_of "$version")
        (cd "$into" && apt-get -qq -o APT::Sandbox::User="$(id -un)" download $packages >&2)
    } || fail "could not download $packages"
}

# Takes the ELF file out of a bzImage (Linux's Documentation/arch/x86/boot.rst: setup_sects, payload_offset and
# payload_length). Without KVM a boot after a reset takes 3 s this way instead of 16: QEMU watches for writes to memory
# that it has translated code from, which is where the compressed kernel would unpack itself to.
unpack_kernel() { # VMLINUZ INTO
    [ -f "$1" ] || fail "no kernel image at $1"
    sectors=$(od -An -tu1 -j497 -N1 "$1" | tr -d ' ')
    # shellcheck disable=SC2046 # two numbers
    set -- "$1" "$2" $(od -An -tu4 -j584 -N8 "$1")
    # The last four bytes are the size of what comes out, which the build appends.
    payload() { tail -c +$(((sectors + 1) * 512 + $2 + 1)) "$1" | head -c $(($3 - 4)); }
    magic=$(payload "$1" "$3" "$4" | od -An -tx1 -N4 | tr -d ' ')
    case $magic in
    02214c18) need lz4 lz4 && unpack="lz4 -dc" ;;
    28b52ffd) need zstd zstd && unpack="zstd -qdc" ;;
    fd377a58) need xz xz-utils && unpack="xz -dc" ;;
    1f8b08*) unpack="gzip -dc" ;;
    *) fail "$1: unknown compression, its payload begins with $magic" ;;
    esac
    payload "$1" "$3" "$4" | $unpack >"$2" || [ "$magic" != "${magic#1f8b}" ] || fail "$1: cannot be unpacked"
}

kernel() { # VERSION
    version=$1 dest=$dir/$1
    if [ -s "$dest/release" ] && [ -s "$dest/vmlinux" ] && [ "$(cat "$dest/wanted")" = "$wanted" ]; then
        return 0
    fi
    need depmod kmod xz xz-utils
    work=$dir/.work-$version
    rm -rf "$work" "$dest"
    download "$version" "$work/debs"
    mkdir -p "$work/root" "$work/out/modules"
    for deb in "$work"/debs/*.deb; do
        dpkg-deb --fsys-tarfile "$deb" | tar -x -C "$work/root"
    done
    # Newer packages hold usr/lib/modules; depmod looks in lib/modules.
    [ -e "$work/root/lib" ] || ln -s usr/lib "$work/root/lib"
    release=$(basename "$work"/root/lib/modules/*)
    tree=$work/root/lib/modules/$release
    unpack_kernel "$work/root/boot/vmlinuz-$release" "$work/out/vmlinux"
    depmod -b "$work/root" "$release" || fail "depmod failed for $release"

    # A line of modules.dep is "module: dependencies", the one to load first last.
    for word in $wanted; do
        name=${word%\?}
        awk -F: -v name="$name" '{
            file = $1; sub(/.*\//, "", file); sub(/\.ko.*/, "", file); gsub(/-/, "_", file)
            if (file != name) next
            n = split($2, needs, " ")
            for (i = n; i >= 1; i--) print needs[i]
            print $1
        }' "$tree/modules.dep" >"$work/closure"
        [ -s "$work/closure" ] || [ "$name" != "$word" ] || tr - _ <"$tree/modules.builtin" | grep -q "/$name\.ko" ||
            fail "Linux $release has no module $name"
        cat "$work/closure"
    done | awk '!seen[$0]++' >"$work/order"
    number=10
    while read -r module; do
        file=$(basename "$module")
        out=$work/out/modules/$number-${file%%.ko*}.ko
        case $file in
        *.ko) cp "$tree/$module" "$out" ;;
        *.ko.xz) xz -dc "$tree/$module" >"$out" ;;
        *.ko.zst)
            need zstd zstd
            zstd -qdc "$tree/$module" >"$out"
            ;;
        *) fail "module $file: unknown compression" ;;
        esac
        number=$((number + 1))
    done <"$work/order"

    echo "$wanted" >"$work/out/wanted"
    mv "$work/out" "$dest"
    rm -rf "$work"
    echo "$release" >"$dest/.release"
    mv "$dest/.release" "$dest/release"
}

need qemu-system-x86_64 qemu-system-x86 setpriv util-linux
for version in "$@"; do
    kernel "$version"
done
