# shellcheck shell=sh
# Read by the scripts here: programs and packages from Debian's or Ubuntu's package sources. $me names the script in messages.
#
# Programs that are missing are installed when this runs as root, and named otherwise, or if FETCH_KERNELS_INSTALL=no.

PATH=$PATH:/usr/sbin:/sbin

fail() {
    echo "$me: $*" >&2
    exit 1
}

# Runs the script anew with these arguments as the only one that uses DIR: tests of several files may ask at once.
alone() { # DIR ARGUMENT...
    if command -v flock >/dev/null && [ "${FETCH_KERNELS_LOCKED:-}" != "$me $1" ]; then
        FETCH_KERNELS_LOCKED="$me $1" exec flock "$1/lock" sh "$0" "$@"
    fi
}

updated=
update_lists() {
    [ -z "$updated" ] || return 0
    updated=yes
    [ "$(id -u)" = 0 ] || return 0
    echo "$me: apt-get update" >&2
    apt-get -qq update >&2 || echo "$me: apt-get update failed; going on with the lists at hand" >&2
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
    echo "$me: apt-get install$missing" >&2
    # shellcheck disable=SC2086 # a list of package names
    DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends $missing >&2 ||
        fail "could not install$missing"
}

# Downloads packages without installing them, as the user who runs this: apt's own may not write here.
fetch() { # INTO PACKAGE...
    into=$1
    shift
    (cd "$into" && apt-get -qq -o APT::Sandbox::User="$(id -un)" download "$@" >&2)
}
