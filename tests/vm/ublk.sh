#!/bin/bash
# vm: --time 120
# ublk: an image is attached, mounted and read with the right data; detaching says who uses the device; nothing is left behind.
. "$REPO/tests/vm/guest/lib.sh"
use_image

attached=$(fr attach --json --transport ublk "$IMAGE")
device=$(json .device <<<"$attached")
id=$(json .id <<<"$attached")
[ "$(json .transport <<<"$attached")" = ublk ] || die "$attached"
[ "$(cat "/sys/class/block/${device##*/}/ro")" = 1 ] || die "$device can be written"
! dd if=/dev/zero of="$device" bs=4096 count=1 2>/dev/null || die "$device was written"
[ "$(blockdev --getsize64 "$device")" = "$(fr inspect --json "$IMAGE" | json .device_bytes)" ] || die "size"

# From the source at first, then from the pool.
for _ in 1 2; do
    mount -o ro,noload "$device" "$WORK/mnt"
    check_tree "$WORK/mnt"
    umount "$WORK/mnt"
    drop_caches
done
echo "read twice with the right sums: $(fr status --json "$id" | jq -c '{hits, misses}')"

# In use by a mount, by a process, by another device.
mount -o ro,noload "$device" "$WORK/mnt"
! fr detach "$id" 2>"$WORK/refusal" || die "a mounted device was detached"
grep -q "mounted on $WORK/mnt" "$WORK/refusal" || die "$(cat "$WORK/refusal")"
umount "$WORK/mnt"
exec 7<"$device"
! fr detach "$id" 2>"$WORK/refusal" || die "an open device was detached"
grep -q "open in" "$WORK/refusal" || die "$(cat "$WORK/refusal")"
exec 7<&-
dmsetup create over --table "0 $(blockdev --getsz "$device") linear $device 0" --readonly
! fr detach "$id" 2>"$WORK/refusal" || die "a device below another one was detached"
grep -q "used by the device dm-0" "$WORK/refusal" || die "$(cat "$WORK/refusal")"
dmsetup remove over
fr detach "$id"
[ ! -e "$device" ] || die "$device is still there"

# By force: whoever reads gets an error, nobody hangs.
fr mount --quiet --transport ublk "$IMAGE" "$WORK/mnt" >/dev/null
head -c 1 "$WORK/mnt/numbers" >/dev/null
# Or it could have to answer its own device while it ends.
until_true 10 free_of_mounts || die "the daemon has its own device mounted"
fr detach --force "$WORK/mnt" || die "force"
drop_caches
! cat "$WORK"/mnt/size-* >/dev/null 2>&1 || die "a device that is gone was read"
umount "$WORK/mnt"
[ "$(fr list --json)" = "[]" ] || die "$(fr list)"

# Several at a time, on the same few threads.
devices=()
for _ in 1 2 3 4 5 6 7 8; do devices+=("$(fr attach --quiet --transport ublk "$IMAGE")"); done
sums=$(for device in "${devices[@]}"; do sha256sum <"$device" & done; wait)
[ "$(sort -u <<<"$sums" | wc -l)" = 1 ] || die "devices of one image differ: $sums"
fr stop
! ls /dev/ublkb* 2>/dev/null || die "devices are left"
! ls /dev/ublkc* 2>/dev/null || die "character devices are left"
echo "8 devices at a time, the same bytes each, all gone after stop"

# Without privileges: the driver would make a device that does not survive its server; that is not what was asked for.
chmod 666 /dev/ublk-control
chown -R nobody "$WORK/root" "$WORK/run"
# The one that cargo built may be where others can't go.
cp "$FIRSTREAD" "$WORK/firstread"
user() { setpriv --reuid nobody --regid nogroup --clear-groups "$WORK/firstread" --root "$WORK/root" --run "$WORK/run" "$@"; }
! user attach --transport ublk "$IMAGE" 2>"$WORK/refusal" || die "a device without privileges"
grep -q "needs CAP_SYS_ADMIN" "$WORK/refusal" || die "$(cat "$WORK/refusal")"
! user attach "$IMAGE" 2>"$WORK/refusal" || die "a device without privileges"
grep -q "firstread export" "$WORK/refusal" || die "$(cat "$WORK/refusal")"
user stop
