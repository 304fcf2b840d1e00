# shellcheck shell=bash
# What the scenarios share: a node of firstread inside of the machine, and an image for it. Source it, then `use_image`.
set -euo pipefail

FIRSTREAD=${FIRSTREAD:-${CARGO_TARGET_DIR:-$REPO/target}/debug/firstread}
[ -x "$FIRSTREAD" ] || { echo "$FIRSTREAD is missing: cargo build"; exit 1; }
WORK=/tmp/vm
mkdir -p "$WORK/mnt"

die() {
    echo "FAILED: $*"
    echo "---- the daemon's log"
    tail -n 150 "$WORK/run/daemon.log" "$WORK/daemon.log" 2>/dev/null || true
    dmesg | tail -n 15
    exit 1
}
trap 'die "line $LINENO: $BASH_COMMAND"' ERR
set -E

fr() { "$FIRSTREAD" --root "$WORK/root" --run "$WORK/run" "$@"; }
daemon_pid() { cat "$WORK/run/daemon.pid"; }

# start_server ARG…: the daemon, in the foreground of its own, with its log in $WORK/daemon.log; $server is its process.
start_server() {
    setsid "$FIRSTREAD" --root "$WORK/root" --run "$WORK/run" daemon "$@" >>"$WORK/daemon.log" 2>&1 &
    # shellcheck disable=SC2034 # for those who kill it
    server=$!
}
# start_daemon ARG…: the same, until it answers.
start_daemon() {
    start_server "$@"
    until_true 20 fr_answers || die "the daemon does not answer"
}
fr_answers() { fr list >/dev/null 2>&1 && [ -S "$WORK/run/control.sock" ]; }


# Whether the first device is served.
served() { [ "$(fr list --json 2>/dev/null | jq -r '.[0].state')" = attached ]; }
gone() { ! kill -0 "$1" 2>/dev/null; }

# until_true SECONDS COMMAND…
until_true() {
    local end=$((SECONDS + $1))
    shift
    until "$@"; do
        [ "$SECONDS" -lt "$end" ] || return 1
        sleep 0.05
    done
}

# use_image: a tree with files of many sizes, packed as $IMAGE (a layout), with its sums in $WORK/sums and its plain bytes in
# $WORK/tree.
use_image() {
    mkdir -p "$WORK/tree/many"
    local size
    for size in 0 1 4096 65535 262145 3000000 20000000; do
        head -c "$size" <(openssl enc -aes-128-ctr -K 00112233445566778899aabbccddeeff -iv 0 -nosalt -in /dev/zero 2>/dev/null) >"$WORK/tree/size-$size"
    done
    seq 1 200000 >"$WORK/tree/numbers"
    for size in $(seq 200); do echo "file $size" >"$WORK/tree/many/$size"; done
    (cd "$WORK/tree" && find . -type f -print0 | sort -z | xargs -0 sha256sum) >"$WORK/sums"
    IMAGE=oci:$WORK/image:test
    fr build --quiet "dir:$WORK/tree" "$IMAGE" "$@"
}

# check_tree DIR: every file has its sum. drop_caches before, so that the device is read.
check_tree() { (cd "$1" && sha256sum --quiet --strict -c "$WORK/sums"); }
drop_caches() { echo 3 >/proc/sys/vm/drop_caches; }
json() { jq -er "$1"; }
# Whether the daemon's mount namespace has no mount of a device that it may serve, nor of one on such.
free_of_mounts() { ! grep -qE ' - \S+ /dev/(ublkb|loop|nbd|mapper/)' "/proc/$(daemon_pid)/mountinfo"; }
