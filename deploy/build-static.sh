#!/bin/sh
# Builds the program as one static file, as the image has it, and prints where it is.
#
#   deploy/build-static.sh [debug]
#
# The same source, compiler and Cargo.lock give the same bytes, wherever they lie: paths of this machine are replaced, symbols
# stripped. With cargo-auditable in PATH the list of crates goes into the file (section .dep-v0), where scanners read it; without
# it, SBOM=none says that this is meant. VSOCK_SIDECAR_REVISION is the commit, where there is no repository to ask.
set -eu

profile=release
case "${1-release}" in
release) ;;
debug) profile=debug ;;
*)
    echo "build-static: '$1' is neither debug nor release" >&2
    exit 64
    ;;
esac

cd "$(dirname "$0")/.."
source=$(pwd -P)
cargo=${CARGO:-cargo}
home=$(cd "${CARGO_HOME:-$HOME/.cargo}" && pwd -P)
sysroot=$("${RUSTC:-rustc}" --print sysroot)
# --target keeps build scripts and macros, which are run here, out of +crt-static.
target=${TARGET:-$("${RUSTC:-rustc}" -vV | sed -n 's/^host: //p')}
directory=${CARGO_TARGET_DIR:-$source/target}

case "$target" in
*-linux-gnu) ;;
*)
    echo "build-static: $target is no glibc target of Linux; set TARGET to one, such as x86_64-unknown-linux-gnu" >&2
    exit 64
    ;;
esac

# The flags travel between unit separators, as paths may have spaces.
separator=$(printf '\037')
flags="-Ctarget-feature=+crt-static"
for pair in "$source=/src" "$home=/cargo" "$sysroot=/rust"; do
    flags="$flags$separator--remap-path-prefix=$pair"
done
export CARGO_ENCODED_RUSTFLAGS="$flags"
unset RUSTFLAGS
# Where `demo --vm` looks for the source tree.
export VSOCK_SIDECAR_SOURCE=/src

set -- build --locked --bin vsock-sidecar --target "$target"
if [ "$profile" = release ]; then
    export CARGO_PROFILE_RELEASE_STRIP=symbols
    set -- "$@" --release
fi
if [ "${SBOM-}" = none ]; then
    :
elif command -v cargo-auditable >/dev/null 2>&1; then
    set -- auditable "$@"
else
    echo "build-static: cargo-auditable is missing: cargo install --locked cargo-auditable, or SBOM=none to go without" >&2
    exit 1
fi
"$cargo" "$@" >&2
echo "$directory/$target/$profile/vsock-sidecar"
