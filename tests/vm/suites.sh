#!/bin/bash
# vm: --time 300
# Test suites of others on writable ublk and NBD devices: nothing fails but what fails on a plain loop device with the same file
# system, with the same journal or without one.
. "$REPO/tests/vm/guest/lib.sh"
. "$REPO/tests/common/suites.sh"
# shellcheck disable=SC2034 # for the suites
TOOLS=${CARGO_TARGET_DIR:-$REPO/target}/tools/bin
EACH=${SUITE_SECONDS:-4}
SIZE=400M
mkdir "$WORK/small"
seq 1 100000 >"$WORK/small/numbers"
IMAGE=oci:$WORK/image:test
# Built with room, so that the file system has inodes for all that the suites make.
fr build --quiet --size 100M "dir:$WORK/small" "$IMAGE" >/dev/null

# options TRANSPORT JOURNAL: of a device with an upper that is kept.
options() { printf '%s\n' --quiet --transport "$1" --upper "$WORK/upper" --journal "$2" --size "$SIZE" "$IMAGE"; }

# on_plain JOURNAL SECONDS: on the file system of a device as a plain file.
on_plain() {
    local device loop ours
    mapfile -t ours < <(options ublk "$1")
    device=$(fr attach "${ours[@]}")
    has_journal "$device" "$1" || die "plain"
    dd if="$device" of="$WORK/plain" bs=1M conv=sparse status=none
    truncate -s "$SIZE" "$WORK/plain"
    fr detach "$device"
    # mount -o loop keeps the loop device open for writing, which this kernel refuses below a mount.
    loop=$(losetup --find --show "$WORK/plain")
    mount "$loop" "$WORK/mnt"
    suites "$WORK/mnt" "$WORK/failed-plain" "$2" || die "plain"
    umount "$WORK/mnt"
    losetup --detach "$loop"
    rm -r "$WORK/plain" "$WORK/upper"
}

# on_ours TRANSPORT JOURNAL SECONDS
on_ours() {
    local device ours
    mapfile -t ours < <(options "$1" "$2")
    fr mount "${ours[@]}" "$WORK/mnt" >/dev/null
    suites "$WORK/mnt" "$WORK/failed-$1" "$3" || die "$1: a wrong byte"
    drop_caches
    cmp "$WORK/small/numbers" "$WORK/mnt/numbers" || die "$1: a file of the image has changed"
    fr umount "$WORK/mnt"
    no_more "$WORK/failed-plain" "$WORK/failed-$1" || die "$1: journal $2"
    device=$(fr attach "${ours[@]}")
    has_journal "$device" "$2" || die "$1"
    e2fsck -fn "$device" >"$WORK/fsck" 2>&1 || { cat "$WORK/fsck"; die "$1: the file system is damaged"; }
    fr detach "$device"
    rm -r "$WORK/upper"
    echo "$1, journal $2: nothing fails but what fails on a plain loop device ($(wc -l <"$WORK/failed-plain") of pjdfstest's and stress-ng's)"
}

for transport in ublk nbd; do
    device=$(fr attach --quiet --transport "$transport" --rw --size "$SIZE" "$IMAGE")
    suite_of_device "$device" "$EACH" || die "$transport: fsx on the device"
    fr detach "$device"
done
on_plain auto "$EACH"
on_ours ublk auto "$EACH"
on_ours nbd auto "$EACH"
on_plain none 1
on_ours ublk none 1
on_ours nbd none 1
fr stop
! grep -hE 'I/O error|EXT4-fs error|Buffer I/O|WARNING|BUG|Oops|hung task' <(dmesg) || die "the kernel complained"
