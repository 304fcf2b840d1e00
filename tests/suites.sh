#!/usr/bin/env bash
# Test suites of others on writable devices: a loop device here, ublk and NBD in the machine of tests/vm/suites.sh. What fails on a
# plain loop device may fail on ours, nothing else. SUITE_SECONDS (10) is about the time for each suite.
set -euo pipefail
cd "$(dirname "$0")/.."
. tests/common/suites.sh
REPO=$PWD
FIRSTREAD=${FIRSTREAD:-${CARGO_TARGET_DIR:-$REPO/target}/debug/firstread}
TOOLS=${CARGO_TARGET_DIR:-$REPO/target}/tools/bin
SECONDS_EACH=${SUITE_SECONDS:-10}
WORK=$(mktemp -d)
IMAGE=oci:$WORK/image:test
fr() { "$FIRSTREAD" --root "$WORK/root" --run "$WORK/run" "$@"; }
clean_up() {
    umount "$WORK/mnt" 2>/dev/null || umount -l "$WORK/mnt" 2>/dev/null || true
    fr stop --force --quiet >/dev/null 2>&1 || true
    rm -rf "$WORK"
}
trap clean_up EXIT
mkdir "$WORK/mnt" "$WORK/tree"
seq 1 100000 >"$WORK/tree/numbers"
# Built with room, so that the file system has inodes for all that the suites make.
fr build --quiet --size 200M "dir:$WORK/tree" "$IMAGE" >/dev/null

# on_both JOURNAL SECONDS: the suites on our file system, and on the same one, with the same journal, as a plain file.
on_both() {
    local journal=$1 seconds=$2 device
    local ours=(--quiet --transport loop --upper "$WORK/upper" --journal "$journal" --size 1G "$IMAGE")
    device=$(fr attach "${ours[@]}")
    has_journal "$device" "$journal"
    dd if="$device" of="$WORK/plain" bs=1M conv=sparse status=none
    truncate -s 1G "$WORK/plain"
    fr detach "$device"
    mount -o loop "$WORK/plain" "$WORK/mnt"
    suites "$WORK/mnt" "$WORK/failed-plain" "$seconds"
    umount "$WORK/mnt"

    fr mount "${ours[@]}" "$WORK/mnt" >/dev/null
    suites "$WORK/mnt" "$WORK/failed-loop" "$seconds"
    cmp "$WORK/tree/numbers" "$WORK/mnt/numbers"
    fr umount "$WORK/mnt"
    no_more "$WORK/failed-plain" "$WORK/failed-loop"
    device=$(fr attach "${ours[@]}")
    has_journal "$device" "$journal"
    e2fsck -fn "$device" >"$WORK/fsck" 2>&1 || { cat "$WORK/fsck"; exit 1; }
    fr detach "$device"
    rm -r "$WORK/upper" "$WORK/plain"
    echo "journal $journal: nothing fails but what fails on a plain loop device ($(wc -l <"$WORK/failed-plain") of pjdfstest's and stress-ng's)"
}

device=$(fr attach --quiet --transport loop --rw --size 1G "$IMAGE")
suite_of_device "$device" "$SECONDS_EACH"
fr detach "$device"
on_both auto "$SECONDS_EACH"
on_both none "$((SECONDS_EACH / 2))"
