#!/bin/bash
# vm: --time 280
# Writable devices on every transport: a file system on one is written, synced, discarded from and checked. On ublk and NBD the daemon
# is killed KILLS times under the writers' load: no writer gets an error, and every file that was synced has its bytes.
. "$REPO/tests/vm/guest/lib.sh"
KILLS=${KILLS:-8}
export FIRSTREAD_NBD_TIMEOUT=2
use_image --size 160M
start_daemon

# writer NAME: files of many sizes, replaced and removed; the sums of those that were synced in $WORK/written-NAME.
writer() {
    local number=0 file
    mkdir -p "$WORK/mnt/$1"
    while [ ! -e "$WORK/stop" ]; do
        file=$WORK/mnt/$1/$((number % 12))
        { head -c $((1 + RANDOM * 40)) /dev/urandom >"$WORK/new-$1" &&
            dd if="$WORK/new-$1" of="$file" bs=32k conv=fsync status=none; } || { echo "$1: $file" >>"$WORK/failures"; return; }
        cmp -s "$WORK/new-$1" "$file" || { echo "$1: $file differs" >>"$WORK/failures"; return; }
        (cd "$WORK/mnt" && sha256sum "$1/$((number % 12))") >"$WORK/sum-$1-$((number % 12))"
        number=$((number + 1))
        echo "$number" >"$WORK/count-$1"
    done
}
unharmed() { [ ! -e "$WORK/failures" ] || die "$1: $(cat "$WORK/failures")"; }
# What was written is there, and what was not is as it was.
check_written() {
    drop_caches
    (cd "$WORK/mnt" && cat "$WORK"/sum-* | sha256sum --quiet --strict -c -) || die "$1: a synced file is not what was written"
    check_tree "$WORK/mnt" || die "$1: a file of the image has changed"
}
check_device() {
    local device
    device=$(fr attach --transport "$1" --upper "$WORK/upper" "$IMAGE")
    e2fsck -fn "$device" >"$WORK/fsck" 2>&1 || { cat "$WORK/fsck"; die "$1: the file system is damaged"; }
    fr detach "$device"
}

for transport in ublk nbd loop; do
    rm -rf "$WORK"/{stop,upper,failures} "$WORK"/sum-* "$WORK"/count-*
    fr mount --quiet --transport "$transport" --upper "$WORK/upper" "$IMAGE" "$WORK/mnt" >/dev/null
    [ "$(fr list --json | jq -r '.[0].read_only')" = false ] || die "$transport: it is said to be read-only"
    [ "$(fr upper list --json | jq -r '.[0] | .dir + " " + .device')" = "$WORK/upper $(fr list --json | jq -r '.[0].id')" ] || die "$transport: upper list"
    ! fr upper discard "$WORK/upper" 2>/dev/null || die "$transport: an upper in use was discarded"
    [ "$(df --output=size -k "$WORK/mnt" | tail -n 1)" -gt 140000 ] || die "$transport: df"
    writers=()
    for name in a b; do
        writer "$name" &
        writers+=($!)
    done
    if [ "$transport" != loop ]; then
        for ((kill = 1; kill <= KILLS; kill++)); do
            sleep "0.$((3 + RANDOM % 7))"
            disown "$server"
            kill -KILL "$server"
            start_server
            if ((kill % 3)); then until_true 30 served || die "$transport: not served again"; fi
        done
        until_true 30 served || die "$transport: not served again"
    fi
    sleep 2
    touch "$WORK/stop"
    wait "${writers[@]}"
    unharmed "$transport"
    check_written "$transport"
    echo "$transport: $(cat "$WORK"/count-* | paste -sd+ | bc) files were written and synced, $([ "$transport" = loop ] || echo "$KILLS kills, ")none was lost"

    # Discards reach the upper: it gets smaller. A second time, with what the tests before left.
    sync -f "$WORK/mnt"
    dd if=/dev/urandom of="$WORK/mnt/large" bs=1M count=24 conv=fsync status=none
    before=$(du -k "$WORK/upper/data" | cut -f1)
    rm "$WORK/mnt/large"
    sync -f "$WORK/mnt"
    fstrim "$WORK/mnt" || die "$transport: fstrim"
    after=$(du -k "$WORK/upper/data" | cut -f1)
    [ "$after" -lt $((before - 16000)) ] || die "$transport: $before KiB before the trim, $after after it"

    # Another mount, another transport, the same files.
    fr umount "$WORK/mnt"
    check_device "$transport"
    fr mount --quiet --upper "$WORK/upper" "$IMAGE" "$WORK/mnt" >/dev/null
    check_written "$transport, mounted again"
    fr umount "$WORK/mnt"
    ! grep -hE 'I/O error|EXT4-fs error|Buffer I/O' <(dmesg) || die "$transport: the kernel complained"
done

# A private upper survives the daemon, and goes with the device. With a size the file system is as large as that.
fr mount --quiet --rw --size 20G "$IMAGE" "$WORK/mnt" >/dev/null
[ "$(df --output=size -BM "$WORK/mnt" | tail -n 1 | tr -dc 0-9)" -gt 19000 ] || die "private: df says $(df "$WORK/mnt")"
echo private >"$WORK/mnt/private"
disown "$server"
kill -KILL "$server"
start_server
until_true 30 served || die "private: not served again"
drop_caches
[ "$(cat "$WORK/mnt/private")" = private ] || die "private: what was written is lost"
[ -n "$(ls "$WORK/root/uppers")" ] || die "private: there is no upper"
fr umount "$WORK/mnt"
[ -z "$(ls "$WORK/root/uppers")" ] || die "private: it is still there"
# An upper belongs to one image.
fr build --quiet "dir:$WORK/tree/many" "oci:$WORK/image:other" >/dev/null
! fr attach --upper "$WORK/upper" "oci:$WORK/image:other" 2>"$WORK/refused" || die "another image was accepted"
grep -q 'belongs to' "$WORK/refused" || die "$(cat "$WORK/refused")"
fr upper list "$WORK/upper" | grep -q "$IMAGE" || die "upper list does not say what it belongs to"
fr upper discard "$WORK/upper" >/dev/null
[ ! -e "$WORK/upper" ] || die "it was not discarded"
fr stop
! dmesg | grep -E 'WARNING|BUG|Oops|hung task' || die "the kernel complained"
