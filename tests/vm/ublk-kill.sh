#!/bin/bash
# vm: --time 240
# The daemon is killed and started again, KILLS times, under reads of a mounted image that check what they get, fio's verify
# among them: nobody gets an error or a wrong byte. Then the same for a handover to a new daemon and a restart as service
# managers do it.
. "$REPO/tests/vm/guest/lib.sh"
KILLS=${KILLS:-50} TRANSPORT=${TRANSPORT:-ublk}
# A pool that holds a third of the image: reads are hits and misses.
export FIRSTREAD_POOL_LIMIT=8M
# Blocks that carry a checksum of themselves.
verified=(--name=load --size=8m --bs=4k --ioengine=io_uring --iodepth=8 --verify=crc32c --verify_fatal=1 --verify_state_save=0 --randrepeat=0)
mkdir -p "$WORK/tree"
fio "${verified[@]}" --filename="$WORK/tree/verified" --rw=write --do_verify=0 >/dev/null
use_image
start_daemon
fr mount --quiet --transport "$TRANSPORT" "$IMAGE" "$WORK/mnt" >/dev/null
fr list --json | jq 'map({id, device, mountpoint})' >"$WORK/before"
device=$(json '.[0].device' <"$WORK/before")

# Three readers: files by their sums, random blocks of the device compared with the bytes it had at first, and fio.
dd if="$device" of="$WORK/disk" bs=1M status=none
echo 0 >"$WORK/passes"
reader() {
    while [ ! -e "$WORK/stop" ]; do
        drop_caches
        check_tree "$WORK/mnt" || { echo "files" >>"$WORK/failures"; return; }
        echo $(($(<"$WORK/passes") + 1)) >"$WORK/passes"
    done
}
blocks=$(($(stat -c %s "$WORK/disk") / 4096))
comparer() {
    local block
    while [ ! -e "$WORK/stop" ]; do
        block=$((RANDOM * 32768 % blocks + RANDOM % 64))
        [ "$block" -lt "$blocks" ] || continue
        cmp -s <(dd if="$device" iflag=direct bs=4096 skip="$block" count=16 status=none || echo failed) \
            <(dd if="$WORK/disk" bs=4096 skip="$block" count=16 status=none) || { echo "block $block" >>"$WORK/failures"; return; }
    done
}
verifier() {
    while [ ! -e "$WORK/stop" ]; do
        fio "${verified[@]}" --filename="$WORK/mnt/verified" --readonly --direct=1 --rw=randread >"$WORK/fio" 2>&1 ||
            { echo "fio: $(cat "$WORK/fio")" >>"$WORK/failures"; return; }
        echo >>"$WORK/verifies"
    done
}
readers=()
verifier &
readers+=($!)
reader &
readers+=($!)
comparer &
readers+=($!)

unharmed() {
    [ ! -e "$WORK/failures" ] || die "$1: a reader failed: $(cat "$WORK/failures")"
    fr list --json | jq 'map({id, device, mountpoint})' >"$WORK/after"
    diff "$WORK/before" "$WORK/after" || die "$1: the device is another one"
}

for ((kill = 1; kill <= KILLS; kill++)); do
    # At once, in the middle of recovery, or when it serves again.
    sleep "0.$((RANDOM % 4))"
    disown "$server"
    kill -KILL "$server"
    start_server
    if ((kill % 3)); then until_true 30 served || die "kill $kill: not served again"; else sleep "0.0$((RANDOM % 10))"; fi
done
until_true 30 served || die "not served again"
unharmed "$KILLS kills"
passes=$(<"$WORK/passes")
until_true 60 test "$(<"$WORK/passes")" -gt "$passes" || true
echo "$KILLS kills: no error, no wrong byte; the files were checked $(<"$WORK/passes") times, by fio $(wc -l <"$WORK/verifies") times"

# A new daemon takes over from the running one.
old=$server
start_server --replace
replaced() { [ "$(daemon_pid)" != "$old" ] && served; }
until_true 30 replaced || die "the daemon was not replaced"
until_true 10 gone "$old" || die "the old daemon stays"
unharmed "replace"
echo "replaced: no error"

# systemctl restart: SIGTERM, then a new one.
old=$server
kill -TERM "$old"
until_true 10 gone "$old" || die "the daemon does not end on SIGTERM"
sleep 0.3
start_server
until_true 30 served || die "not served after a restart"
unharmed "restart"
echo "restarted: no error"

touch "$WORK/stop"
wait "${readers[@]}"
unharmed "the end"
fr umount "$WORK/mnt"
fr stop
! ls /dev/ublk[bc]* /sys/class/block/nbd*/pid 2>/dev/null || die "devices are left"
! dmesg | grep -E 'WARNING|BUG|Oops|I/O error|EXT4-fs error' || die "the kernel complained"
