#!/usr/bin/env bash
# Test suites of others on writable devices: a loop device here, ublk and NBD in the machine of tests/vm/suites.sh. What fails on a
# plain loop device may fail on ours, nothing else. SUITE_SECONDS (20) is about the time for each suite.
set -euo pipefail
cd "$(dirname "$0")/.."
. tests/common/suites.sh
REPO=$PWD
FIRSTREAD=${FIRSTREAD:-${CARGO_TARGET_DIR:-$REPO/target}/debug/firstread}
TOOLS=${CARGO_TARGET_DIR:-$REPO/target}/tools/bin
SECONDS_EACH=${SUITE_SECONDS:-20}
WORK=$(mktemp -d)
fr() { "$FIRSTREAD" --root "$WORK/root" --run "$WORK/run" "$@"; }
clean_up() {
    umount "$WORK/mnt" 2>/dev/null || umount -l "$WORK/mnt" 2>/dev/null || true
    fr stop --force --quiet >/dev/null 2>&1 || true
    rm -rf "$WORK"
}
trap clean_up EXIT
mkdir "$WORK/mnt" "$WORK/tree"
seq 1 100000 >"$WORK/tree/numbers"
fr build --quiet "dir:$WORK/tree" "oci:$WORK/image:test" >/dev/null

# The same file system as a plain file.
device=$(fr attach --quiet --transport loop --rw --size 1G "oci:$WORK/image:test")
dd if="$device" of="$WORK/plain" bs=1M conv=sparse status=none
truncate -s 1G "$WORK/plain"
suite_of_device "$device" "$SECONDS_EACH"
fr detach "$device"
mount -o loop "$WORK/plain" "$WORK/mnt"
suites "$WORK/mnt" "$WORK/failed-plain" "$SECONDS_EACH"
umount "$WORK/mnt"

# Without a journal, as the plain one: room that a journal has not committed yet can be missing for a moment.
fr mount --quiet --transport loop --upper "$WORK/upper" --journal none --size 1G "oci:$WORK/image:test" "$WORK/mnt" >/dev/null
suites "$WORK/mnt" "$WORK/failed-loop" "$SECONDS_EACH"
cmp "$WORK/tree/numbers" "$WORK/mnt/numbers"
fr umount "$WORK/mnt"
comm -13 "$WORK/failed-plain" "$WORK/failed-loop" >"$WORK/more"
[ ! -s "$WORK/more" ] || { echo "these fail on our device alone:"; cat "$WORK/more"; exit 1; }
device=$(fr attach --quiet --transport loop --upper "$WORK/upper" "oci:$WORK/image:test")
e2fsck -fn "$device" >"$WORK/fsck" 2>&1 || { cat "$WORK/fsck"; exit 1; }
fr detach "$device"
echo "nothing fails but what fails on a plain loop device ($(wc -l <"$WORK/failed-plain") of pjdfstest's and stress-ng's)"
