#!/bin/bash
# vm: --time 180
# The daemon is killed while a start is laid into the page cache and most of it is still to come: what lays ends with it, the next daemon
# takes over, every byte is right, and the device goes when it is unmounted.
. "$REPO/tests/vm/guest/lib.sh"
FAULT=$(dirname "$FIRSTREAD")/firstread-fault
ip link set lo up
use_image
start_daemon
fr mount --quiet "$IMAGE" "$WORK/mnt" >/dev/null
check_tree "$WORK/mnt"
fr profile "$WORK/mnt" -o "$WORK/profile" >/dev/null
fr umount "$WORK/mnt"
fr stop
fr optimize --quiet "$IMAGE" "oci:$WORK/image:fast" --profile "$WORK/profile"

"$FAULT" "$WORK/image" --listen 127.0.0.1:5999 --bandwidth 2M >"$WORK/fault.log" 2>&1 &
fault=$!
answers() { : 2>/dev/null 3<>/dev/tcp/127.0.0.1/5999; }
until_true 10 answers || die "firstread-fault does not answer: $(cat "$WORK/fault.log")"
laid() { [ "$(fr status --json "$WORK/mnt" 2>/dev/null | jq '.startup | .streaming and .laid_bytes > 0')" = true ]; }
lays() { pgrep -P "$server" -f lay-start; }

for transport in ublk nbd; do
    rm -rf "$WORK/root" "$WORK/run"
    start_daemon
    fr mount --quiet --plain-http --transport "$transport" 127.0.0.1:5999/image:fast "$WORK/mnt" >/dev/null
    until_true 10 laid || die "$transport: nothing is laid: $(fr status --json "$WORK/mnt" | jq -c .startup)"
    child=$(lays) || die "$transport: nobody lays"
    disown "$server"
    kill -KILL "$server"
    until_true 10 gone "$child" || die "$transport: what lays stays without a daemon: $(cat "/proc/$child/stack")"
    until_true 10 gone "$server" || die "$transport: the daemon does not end: $(cat "/proc/$server/stack")"
    start_daemon
    until_true 30 served || die "$transport: not served again"
    check_tree "$WORK/mnt"
    fr umount "$WORK/mnt"
    [ "$(fr list --json)" = "[]" ] || die "$transport: $(fr list)"
    fr stop
    echo "$transport: killed while a start was laid"

    # And taken away by force: what lays must not keep the device.
    rm -rf "$WORK/root" "$WORK/run"
    start_daemon
    fr mount --quiet --plain-http --transport "$transport" 127.0.0.1:5999/image:fast "$WORK/mnt" >/dev/null
    until_true 10 laid || die "$transport: nothing is laid"
    child=$(lays) || die "$transport: nobody lays"
    fr detach --force "$WORK/mnt" || die "$transport: force"
    until_true 10 gone "$child" || die "$transport: what lays stays"
    umount "$WORK/mnt"
    [ "$(fr list --json)" = "[]" ] || die "$transport: $(fr list)"
    fr stop
    echo "$transport: taken away while a start was laid"
done
kill "$fault"
