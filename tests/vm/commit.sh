#!/bin/bash
# vm: --time 240
# Writable ublk and NBD devices are committed while a writer goes on, and the daemon is killed between: each image has every file
# that was synced when its commit began, whole, in a file system without a fault; the writer gets no error and is not left frozen.
. "$REPO/tests/vm/guest/lib.sh"
COMMITS=${COMMITS:-3}
export FIRSTREAD_NBD_TIMEOUT=2
use_image --size 160M
mkdir -p "$WORK/look"
start_daemon

# writer: files that stay, one after the other; the sums of those that were synced in $WORK/synced.
writer() {
    local number=0
    while [ ! -e "$WORK/stop" ]; do
        { head -c $((1 + RANDOM * 8)) /dev/urandom >"$WORK/new" &&
            dd if="$WORK/new" of="$WORK/mnt/w$number" bs=32k conv=fsync status=none; } || { echo "w$number" >>"$WORK/failures"; return; }
        echo "$(sha256sum <"$WORK/new" | cut -d' ' -f1)  w$number" >>"$WORK/synced"
        number=$((number + 1))
        sleep 0.05
    done
}
count() { wc -l <"$WORK/synced"; }
more_than() { [ "$(count)" -gt "$1" ]; }

for transport in ublk nbd; do
    rm -rf "$WORK"/{stop,upper,failures,synced}
    touch "$WORK/synced"
    fr mount --quiet --transport "$transport" --upper "$WORK/upper" "$IMAGE" "$WORK/mnt" >/dev/null
    writer &
    writing=$!
    for ((round = 1; round <= COMMITS; round++)); do
        until_true 30 more_than $(($(count) + 10)) || die "$transport: the writer does not go on: $(cat "$WORK/failures")"
        cp "$WORK/synced" "$WORK/before"
        committed=oci:$WORK/image:$transport-$round
        fr commit --quiet "$WORK/mnt" "$committed" >/dev/null || die "$transport: commit $round"
        fr mount --quiet --transport "$transport" "$committed" "$WORK/look" >/dev/null
        check_tree "$WORK/look" || die "$transport: a file of the image has changed"
        (cd "$WORK/look" && sha256sum --quiet --strict -c "$WORK/before") || die "$transport: commit $round lacks what was synced"
        fr umount "$WORK/look"
        device=$(fr attach --transport "$transport" "$committed")
        e2fsck -fn "$device" >"$WORK/fsck" 2>&1 || { cat "$WORK/fsck"; die "$transport: commit $round has a damaged file system"; }
        fr detach "$device"
        disown "$server"
        kill -KILL "$server"
        start_server
        until_true 30 served || die "$transport: not served again"
    done
    until_true 30 more_than $(($(count) + 10)) || die "$transport: the writer does not go on"
    touch "$WORK/stop"
    wait "$writing"
    [ ! -e "$WORK/failures" ] || die "$transport: $(cat "$WORK/failures")"
    [ -z "$(ls "$WORK/root/snapshots")" ] || die "$transport: snapshots are left: $(ls "$WORK/root/snapshots")"
    fr umount "$WORK/mnt"
    echo "$transport: $COMMITS commits beside a writer of $(count) files, the daemon killed after each"
done
fr stop
! dmesg | grep -E 'I/O error|EXT4-fs error|Buffer I/O|WARNING|BUG|Oops|hung task' || die "the kernel complained"
