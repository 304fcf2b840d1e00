#!/bin/bash
# vm: --time 120
# The kernel's NBD client: an image is attached, mounted and read with the right data; detaching says who uses the device;
# nothing is left behind.
. "$REPO/tests/vm/guest/lib.sh"
use_image

attached=$(fr attach --json --transport nbd "$IMAGE")
device=$(json .device <<<"$attached")
id=$(json .id <<<"$attached")
name=${device##*/}
[ "$(json .transport <<<"$attached")" = nbd ] || die "$attached"
[ "$(cat "/sys/class/block/$name/ro")" = 1 ] || die "$device can be written"
! dd if=/dev/zero of="$device" bs=4096 count=1 2>/dev/null || die "$device was written"
[ "$(blockdev --getsize64 "$device")" = "$(fr inspect --json "$IMAGE" | json .device_bytes)" ] || die "size"
connections=$(grep -l '^nbd$' "/proc/$(daemon_pid)"/task/*/comm | wc -l)
[ "$connections" = 2 ] || die "$connections connections"
grep -q '^firstread:' "/sys/class/block/$name/backend" || die "no identifier"

# From the source at first, then from the pool.
for _ in 1 2; do
    mount -o ro,noload "$device" "$WORK/mnt"
    check_tree "$WORK/mnt"
    umount "$WORK/mnt"
    drop_caches
done
echo "read twice with the right sums: $(fr status --json "$id" | jq -c '{hits, misses}')"

mount -o ro,noload "$device" "$WORK/mnt"
! fr detach "$id" 2>"$WORK/refusal" || die "a mounted device was detached"
grep -q "mounted on $WORK/mnt" "$WORK/refusal" || die "$(cat "$WORK/refusal")"
umount "$WORK/mnt"
exec 7<"$device"
! fr detach "$id" 2>"$WORK/refusal" || die "an open device was detached"
grep -q "open in" "$WORK/refusal" || die "$(cat "$WORK/refusal")"
exec 7<&-
fr detach "$id"
[ ! -e "/sys/class/block/$name/pid" ] || die "$device is still connected"

# By force: whoever reads gets an error, nobody hangs.
fr mount --quiet --transport nbd "$IMAGE" "$WORK/mnt" >/dev/null
head -c 1 "$WORK/mnt/numbers" >/dev/null
fr detach --force "$WORK/mnt" || die "force"
drop_caches
! cat "$WORK"/mnt/size-* >/dev/null 2>&1 || die "a device that is gone was read"
umount "$WORK/mnt"
[ "$(fr list --json)" = "[]" ] || die "$(fr list)"

# nbd-client, the kernel's own way in, with the server of `export`.
setsid "$FIRSTREAD" --root "$WORK/root" --run "$WORK/run" export "$IMAGE" --nbd "unix:$WORK/nbd.sock" >"$WORK/export.log" 2>&1 &
export=$!
until_true 20 test -S "$WORK/nbd.sock" || die "$(cat "$WORK/export.log")"
nbd-client -unix "$WORK/nbd.sock" -name '' -connections 2 /dev/nbd5 >"$WORK/nbd-client.log" 2>&1 || die "$(cat "$WORK/nbd-client.log")"
mount -o ro,noload /dev/nbd5 "$WORK/mnt"
check_tree "$WORK/mnt"
umount "$WORK/mnt"
nbd-client -d /dev/nbd5 >>"$WORK/nbd-client.log" 2>&1
kill "$export"
echo "nbd-client: the same sums"

fr stop
! cat /sys/class/block/nbd*/pid 2>/dev/null || die "devices are left"
