#!/bin/bash
# vm: --time 290
# Test suites of others on writable ublk and NBD devices: nothing fails but what fails on a plain loop device.
. "$REPO/tests/vm/guest/lib.sh"
. "$REPO/tests/common/suites.sh"
# shellcheck disable=SC2034 # for the suites
TOOLS=${CARGO_TARGET_DIR:-$REPO/target}/tools/bin
EACH=${SUITE_SECONDS:-5}
mkdir "$WORK/small"
seq 1 100000 >"$WORK/small/numbers"
IMAGE=oci:$WORK/image:test
fr build --quiet "dir:$WORK/small" "$IMAGE" >/dev/null

device=$(fr attach --quiet --transport ublk --rw --size 400M "$IMAGE")
dd if="$device" of="$WORK/plain" bs=1M conv=sparse status=none
truncate -s 400M "$WORK/plain"
fr detach "$device"
# mount -o loop keeps the loop device open for writing, which this kernel refuses below a mount.
loop=$(losetup --find --show "$WORK/plain")
mount "$loop" "$WORK/mnt"
suites "$WORK/mnt" "$WORK/failed-plain" "$EACH" || die "plain"
umount "$WORK/mnt"
losetup --detach "$loop"
rm "$WORK/plain"

# Without a journal, as the plain one: room that a journal has not committed yet can be missing for a moment.
for transport in ublk nbd; do
    device=$(fr attach --quiet --transport "$transport" --rw --size 400M "$IMAGE")
    suite_of_device "$device" "$EACH" || die "$transport: fsx on the device"
    fr detach "$device"
    fr mount --quiet --transport "$transport" --upper "$WORK/upper" --journal none --size 400M "$IMAGE" "$WORK/mnt" >/dev/null
    suites "$WORK/mnt" "$WORK/failed-$transport" "$EACH" || die "$transport: a wrong byte"
    drop_caches
    cmp "$WORK/small/numbers" "$WORK/mnt/numbers" || die "$transport: a file of the image has changed"
    fr umount "$WORK/mnt"
    comm -13 "$WORK/failed-plain" "$WORK/failed-$transport" >"$WORK/more"
    [ ! -s "$WORK/more" ] || die "on $transport alone these fail: $(cat "$WORK/more")"
    device=$(fr attach --quiet --transport "$transport" --upper "$WORK/upper" "$IMAGE")
    e2fsck -fn "$device" >"$WORK/fsck" 2>&1 || { cat "$WORK/fsck"; die "$transport: the file system is damaged"; }
    fr detach "$device"
    rm -rf "$WORK/upper"
    echo "$transport: nothing fails but what fails on a plain loop device ($(wc -l <"$WORK/failed-plain") of pjdfstest's and stress-ng's)"
done
fr stop
! grep -hE 'I/O error|EXT4-fs error|Buffer I/O|WARNING|BUG|Oops|hung task' <(dmesg) || die "the kernel complained"
