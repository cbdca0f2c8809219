#!/bin/sh
# Fetches the guest kernels of the real guest test and of `demo --vm`, and the programs that these need.
#
#   fetch-kernels.sh [DIR VERSION...]
#
# DIR is `vm` in cargo's target directory and the VERSIONs are 6.1 and 6.12 unless given otherwise.
# For each VERSION it leaves
#   DIR/VERSION/vmlinux            the kernel, uncompressed, to be entered as an ELF file (PVH)
#   DIR/VERSION/modules/NN-*.ko    the modules a vsock guest needs, uncompressed, to be loaded in the order of NN
#   DIR/VERSION/extra/NN-*.ko      what some tests load behind these: a network card, vsock within one guest
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
extra="virtio_net vsock_loopback vsock_diag"

me=fetch-kernels
. "$(dirname "$0")/apt.sh"

[ $# -gt 0 ] || set -- "${CARGO_TARGET_DIR:-$(dirname "$0")/../../target}/vm" 6.1 6.12
[ $# -ge 2 ] || fail "usage: fetch-kernels.sh [DIR VERSION...]"
mkdir -p "$1"
dir=$(cd "$1" && pwd)
shift

[ "$(uname -m)" = x86_64 ] || fail "the guest is x86-64 and its test program is built here: this machine is $(uname -m)"

alone "$dir" "$@"

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
    fetch "$into" $packages || {
        update_lists
        packages=$(packages_of "$version")
        fetch "$into" $packages
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

# The modules of these names and what they need, in the order of loading. A line of modules.dep is "module: dependencies",
# the one to load first last.
closure() { # INTO MODULE...
    into=$1
    shift
    : >"$work/all"
    for word in "$@"; do
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
        cat "$work/closure" >>"$work/all"
    done
    awk '!seen[$0]++' "$work/all" >"$into"
}

# Unpacks the modules that are named on standard input; numbers go on from call to call.
take() { # INTO
    mkdir -p "$work/out/$1"
    while read -r module; do
        file=$(basename "$module")
        out=$work/out/$1/$number-${file%%.ko*}.ko
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
    done
}

kernel() { # VERSION
    version=$1 dest=$dir/$1
    if [ -s "$dest/release" ] && [ -s "$dest/vmlinux" ] && [ "$(cat "$dest/wanted")" = "$wanted $extra" ]; then
        return 0
    fi
    need depmod kmod xz xz-utils
    work=$dir/.work-$version
    rm -rf "$work" "$dest"
    download "$version" "$work/debs"
    mkdir -p "$work/root" "$work/out"
    for deb in "$work"/debs/*.deb; do
        dpkg-deb --fsys-tarfile "$deb" | tar -x -C "$work/root"
    done
    # Newer packages hold usr/lib/modules; depmod looks in lib/modules.
    [ -e "$work/root/lib" ] || ln -s usr/lib "$work/root/lib"
    release=$(basename "$work"/root/lib/modules/*)
    tree=$work/root/lib/modules/$release
    unpack_kernel "$work/root/boot/vmlinuz-$release" "$work/out/vmlinux"
    depmod -b "$work/root" "$release" || fail "depmod failed for $release"

    # shellcheck disable=SC2086 # lists of words
    closure "$work/wanted" $wanted
    # shellcheck disable=SC2086
    closure "$work/both" $wanted $extra
    number=10
    take modules <"$work/wanted"
    tail -n +"$(($(wc -l <"$work/wanted") + 1))" "$work/both" | take extra

    echo "$wanted $extra" >"$work/out/wanted"
    mv "$work/out" "$dest"
    rm -rf "$work"
    echo "$release" >"$dest/.release"
    mv "$dest/.release" "$dest/release"
}

need qemu-system-x86_64 qemu-system-x86 setpriv util-linux
for version in "$@"; do
    kernel "$version"
done
