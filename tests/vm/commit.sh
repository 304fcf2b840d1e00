#!/bin/bash
# vm: --time 270
# Writable ublk and NBD devices are committed while a writer goes on, and the daemon is killed between: each image has every file
# that was synced when its commit began, whole, in a file system without a fault; the writer gets no error and is not left frozen.
# So does an export whose file system somebody else has mounted, as a guest does: nothing stands still, its journal is replayed.
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
# churn: directories and files that are not synced, so that a commit finds the journal in the midst of something.
churn() {
    local number=0 dir
    while [ ! -e "$WORK/stop" ]; do
        dir=$WORK/mnt/churn-$((number % 8))/$number
        { mkdir -p "$dir" && ln -s "$WORK/$(printf '%0150d' "$number")" "$dir/link" && echo "$number" >"$dir/new" &&
            mv "$dir/new" "$dir/file"; } || { echo "churn $number" >>"$WORK/failures"; return; }
        number=$((number + 1))
    done
}
more_than() { [ "$(count)" -gt "$1" ]; }

# check_commit TRANSPORT IMAGE: it has what was synced before, listed in $WORK/before, and no fault.
check_commit() {
    fr mount --quiet --transport "$1" "$2" "$WORK/look" >/dev/null
    check_tree "$WORK/look" || die "$2: a file of the image has changed"
    (cd "$WORK/look" && sha256sum --quiet --strict -c "$WORK/before") || die "$2 lacks what was synced"
    fr umount "$WORK/look"
    local device
    device=$(fr attach --transport "$1" "$2")
    e2fsck -fn "$device" >"$WORK/fsck" 2>&1 || { cat "$WORK/fsck"; die "$2 has a damaged file system"; }
    ! dumpe2fs -h "$device" 2>/dev/null | grep -q '^Filesystem features:.*\(has_journal\|needs_recovery\)' || die "$2 has a journal"
    fr detach "$device"
}

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
        check_commit "$transport" "$committed"
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

# A file system that firstread does not know to be mounted is not frozen.
rm -rf "$WORK"/{stop,upper,failures,synced}
touch "$WORK/synced"
setsid "$FIRSTREAD" --root "$WORK/root" --run "$WORK/run" export "$IMAGE" --upper "$WORK/upper" --nbd "unix:$WORK/nbd.sock" >"$WORK/export.log" 2>&1 &
export=$!
until_true 20 test -S "$WORK/nbd.sock" || die "$(cat "$WORK/export.log")"
nbd-client -unix "$WORK/nbd.sock" -name '' -connections 2 /dev/nbd5 >"$WORK/nbd-client.log" 2>&1 || die "$(cat "$WORK/nbd-client.log")"
mount -o noatime /dev/nbd5 "$WORK/mnt"
writer &
writing=$!
churn &
churning=$!
for ((round = 1; round <= COMMITS; round++)); do
    until_true 30 more_than $(($(count) + 10)) || die "export: the writer does not go on: $(cat "$WORK/failures")"
    cp "$WORK/synced" "$WORK/before"
    fr commit --quiet "$WORK/upper" "oci:$WORK/image:export-$round" >/dev/null || die "export: commit $round"
    check_commit nbd "oci:$WORK/image:export-$round"
done
touch "$WORK/stop"
wait "$writing" "$churning"
[ ! -e "$WORK/failures" ] || die "export: $(cat "$WORK/failures")"
umount "$WORK/mnt"
nbd-client -d /dev/nbd5 >>"$WORK/nbd-client.log" 2>&1
kill "$export"
echo "export: $COMMITS commits of a file system that was not frozen, beside a writer of $(count) files and another of directories"
fr stop
! dmesg | grep -E 'I/O error|EXT4-fs error|Buffer I/O|WARNING|BUG|Oops|hung task' || die "the kernel complained"
