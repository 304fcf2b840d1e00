#!/usr/bin/env bash
# Containers as Kata runs them: containerd creates them with the snapshotter of block devices; a stand-in for Kata's runtime plugs each
# container's device into a virtual machine that runs already, and a stand-in for its agent mounts it there as the mount says and runs
# the container's command in it. What they write is theirs alone, can be committed, and goes with the container.
set -euo pipefail
BUILT=debug
# shellcheck source=../scripts/lib.sh
. "$(dirname "$(readlink -f "$0")")/../scripts/lib.sh"

need_root
need_tools docker-registry skopeo containerd ctr qemu-system-x86_64 cpio xz jq sha256sum python3 debugfs
[ -x "$FIRSTREAD" ] || die "$FIRSTREAD is missing: cargo build"
begin kata
# shellcheck source=common/qemu.sh
. "$REPO/tests/common/qemu.sh"

# --- the machine ---------------------------------------------------------------------------------------------------

debian_kernel
# The agent: a line asks for a container; what it prints comes out with its name before it.
cat >"$WORK/init" <<'INIT'
#!/bin/busybox sh
PATH=/bin
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
mkdir -p /run
insmod /virtio_blk.ko
run() { # NAME SERIAL TYPE OPTIONS COMMAND
    local disk= dir root=/run/$1
    until [ -n "$disk" ]; do
        for dir in /sys/block/vd*; do [ "$(cat "$dir/serial" 2>&1)" != "$2" ] || disk=/dev/${dir##*/}; done
        sleep 0.1
    done
    mkdir "$root"
    mount -t "$3" -o "$4" "$disk" "$root" && mount -t proc proc "$root/proc" && mount -t devtmpfs dev "$root/dev" || echo "not mounted"
    grep " $root " /proc/mounts
    echo "$5" | base64 -d >"$root.command"
    sh "$root.command" "$root" </dev/null 2>&1 || echo "exit code $?"
    umount "$root/proc" "$root/dev" "$root" || echo "still in use"
    echo over
}
stty -F /dev/ttyS1 raw -echo
# The firmware has left the cursor in the middle of a line.
printf "\nagent ready\n"
exec 3<>/dev/ttyS1
while read -r name rest; do
    # Who asked may hang up now, and not before: what was not read yet would be lost.
    echo taken >&3
    { run "$name" $rest | sed "s/^/$name: /"; } 3>&- &
done <&3
INIT
pack_initramfs "$WORK/init"
# Four slots to plug disks into.
slots=()
for slot in 0 1 2 3; do slots+=(-device "pcie-root-port,id=slot$slot,chassis=$slot,slot=$slot"); done
start_qemu "$LOGS/machine.log" "${slots[@]}" -qmp "unix:$WORK/qmp.sock,server=on,wait=off" -serial "unix:$WORK/agent.sock,server=on,wait=off"

# qmp COMMAND ARGUMENTS [EVENT]: asks QEMU, and waits for an event.
cat >"$WORK/qmp.py" <<'PY'
import json, socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.settimeout(60)
connection.connect(sys.argv[1])
lines = connection.makefile("rw")
lines.readline()
def ask(command, arguments, event=None):
    lines.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
    lines.flush()
    answered = happened = False
    while not (answered and (happened or not event)):
        message = json.loads(lines.readline())
        if "error" in message:
            sys.exit(f"{command} {arguments}: {message['error']['desc']}")
        answered |= "return" in message
        happened |= "event" in message and message["event"] == event
ask("qmp_capabilities", {})
ask(sys.argv[2], json.loads(sys.argv[3]), *sys.argv[4:])
PY
qmp() { python3 "$WORK/qmp.py" "$WORK/qmp.sock" "$@"; }

# --- containerd and the image --------------------------------------------------------------------------------------

image=$("$REPO/scripts/image" demo)
start_registry
push_layout "$image/layout" demo:latest
use_node kata
fr build "$REGISTRY/demo:latest" "$REGISTRY/demo:packed" --level 1 --quiet --json >"$WORK/build.json"
start_containerd
start_snapshotter --name kata --mounts block
fr pull --quiet --containerd "$WORK/containerd/sock" "$REGISTRY/demo:packed" >/dev/null

# What is left of snapshots and devices.
state=$FR_DIR/root/snapshotter/kata
remains() {
    grep -F " $state" /proc/self/mountinfo || true
    fr list
    find "$state/snapshots" "$state/removed" "$state/new" -mindepth 1 -maxdepth 1
}

# --- the runtime ---------------------------------------------------------------------------------------------------

# create NAME SCRIPT: a container of the image, not running.
create() { "${CTR[@]}" containers create --snapshotter firstread "$REGISTRY/demo:packed" "$1" -- sh -c "$2"; }

# start NAME SLOT: as Kata's runtime, from what containerd says of the container. Sets $DEVICE.
start() {
    local info mount code rest
    info=$("${CTR[@]}" containers info "$1")
    mount=$("${CTR[@]}" snapshots --snapshotter firstread mounts /rootfs "$(jq -r .SnapshotKey <<<"$info")")
    # Only a root file system that is exactly one mount of a block device becomes a disk of the machine.
    [ "$(wc -l <<<"$mount")" = 1 ] || die "several mounts: $mount"
    # mount -t TYPE SOURCE TARGET -o OPTIONS
    read -r _ _ TYPE DEVICE _ _ OPTIONS rest <<<"$mount"
    [ "$TYPE $OPTIONS $rest" = "ext4 rw " ] || die "not what Kata looks for: $mount"
    [ -b "$DEVICE" ] || die "not a block device: $mount"
    qmp blockdev-add "$(jq -n --arg name "$1" --arg file "$DEVICE" '{driver: "host_device", "node-name": $name, filename: $file, cache: {direct: true}}')"
    qmp device_add "$(jq -n --arg name "$1" --arg slot "slot$2" '{driver: "virtio-blk-pci", bus: $slot, drive: $name, id: ("disk-" + $name), serial: $name}')"
    # The process of the container, as its specification has it.
    code=$(jq -r '.Spec.process | "exec env -i " + (.env | map(@sh) | join(" ")) + " chroot \"$1\" /usr/bin/env -C " + (.cwd | @sh)
        + " /usr/bin/setpriv --reuid \(.user.uid) --regid \(.user.gid) --clear-groups " + (.args | map(@sh) | join(" "))' <<<"$info" | base64 -w0)
    python3 -c 'import socket, sys
agent = socket.socket(socket.AF_UNIX)
agent.connect(sys.argv[1])
agent.sendall(sys.argv[2].encode() + b"\n")
assert agent.makefile().readline().strip() == "taken"' "$WORK/agent.sock" "$1 $1 $TYPE $OPTIONS $code"
}
# stop NAME: its disk is taken out of the machine.
stop() {
    qmp device_del "{\"id\": \"disk-$1\"}" DEVICE_DELETED
    qmp blockdev-del "{\"node-name\": \"$1\"}"
}
said() { tr -d '\r' <"$LOGS/machine.log" | sed -n "s/^$1: //p"; }

# --- two containers in one machine ---------------------------------------------------------------------------------

files='find usr/lib/python3 usr/share usr/bin app -type f | LC_ALL=C sort | head -n 900'
expected=$(cd "$image/tree" && sh -c "$files | xargs -d '\n' cat | sha256sum")
# shellcheck disable=SC2016
script='echo "user $(id -u) in $(pwd), $PYTHONUNBUFFERED"
    head -c 4000000 /dev/urandom >/tmp/data; sha256sum /tmp/data
    echo "mine, $(ls /tmp)" >/tmp/written; sync; echo wrote
    '$files" | split -n r/3 - /tmp/part; for part in /tmp/part*; do xargs -d '\n' cat <\$part >/dev/null; echo read \$part; done; rm /tmp/part*
    $files | xargs -d '\n' cat | sha256sum"
create one "$script"
create two 'ls -A /tmp; echo two >/tmp/written; cat /tmp/written; python3 -c "import numpy; print(numpy.arange(4).sum())"'
[ "$(fr list --json | jq '[.[] | select(.read_only | not)] | length')" = 2 ] || die "a container has no device of its own: $(fr list)"
console 240 'agent ready' "$LOGS/machine.log" "$qemu"
start one 0
device=$DEVICE
console 240 'one: wrote' "$LOGS/machine.log" "$qemu"
# Its disk does not depend on the snapshotter.
kill -KILL "$SNAPSHOTTER_PID"
wait "$SNAPSHOTTER_PID" 2>/dev/null || true
console 240 'one: over' "$LOGS/machine.log" "$qemu"
start_snapshotter --name kata --mounts block
start two 1
[ "$DEVICE" != "$device" ] || die "both have $device"
console 240 'two: over' "$LOGS/machine.log" "$qemu"

said one >"$WORK/one"
grep -Eqx '/dev/vd[a-z]+ /run/one ext4 rw,relatime.*' "$WORK/one" || die "its root: $(cat "$WORK/one")"
grep -qx 'user 65534 in /, 1' "$WORK/one" || die "not the image's process: $(cat "$WORK/one")"
grep -qxF "$expected" "$WORK/one" || die "it read something else: $(cat "$WORK/one")"
[ "$(said two | tail -n +2 | tr '\n' ' ')" = "two 6 over " ] || die "the second one: $(said two)"
! grep -E 'I/O error|EXT4-fs error|not mounted|still in use|exit code' "$LOGS/machine.log" >&2 || die "the machine saw errors"
echo "two containers ran in one machine, each on a disk of its own, through a kill of the snapshotter: right data"

# --- what they wrote -----------------------------------------------------------------------------------------------

stop one
upper=$(fr list --json | jq -r --arg device "$device" '.[] | select(.device == $device) | .upper.dir')
case $upper in "$state"/snapshots/*) ;; *) die "the container writes to $upper" ;; esac
[ "$(du -k "$upper" | tail -n 1 | cut -f1)" -gt 3900 ] || die "the upper has $(du -k "$upper")"
[ "$("${CTR[@]}" snapshots --snapshotter firstread usage one | awk '/^one/ {print int($2)}')" -ge 3 ] || die "usage: $("${CTR[@]}" snapshots --snapshotter firstread usage one)"
debugfs -R 'cat /tmp/written' "$device" 2>/dev/null | grep -qx 'mine, data' || die "what it wrote is not there"
debugfs -R 'cat /tmp/data' "$device" 2>/dev/null | sha256sum | grep -q "$(sed -n 's| *-*/tmp/data||p' "$WORK/one")" || die "its data differ"
e2fsck -fn "$device" >"$LOGS/fsck.log" 2>&1 || die "the file system is damaged: $(cat "$LOGS/fsck.log")"

# Committed by its name: an image with what the container wrote.
fr commit one "$REGISTRY/demo:committed" --quiet >/dev/null
mkdir "$WORK/committed"
fr mount --quiet "$REGISTRY/demo:committed" "$WORK/committed" >/dev/null
[ "$(cat "$WORK/committed/tmp/written")" = 'mine, data' ] || die "the committed image lacks what the container wrote"
fr umount "$WORK/committed"

# --- and that it goes ----------------------------------------------------------------------------------------------

# The first is free; the second is removed while the machine still has its disk, as after a crash of the runtime.
"${CTR[@]}" containers rm one two
lacks() { fr list --json | jq -e --arg device "$1" 'all(.[]; .device != $device)' >/dev/null; }
wait_for 30 lacks "$device" || die "the device of the first container stays: $(fr list)"
wait_for 30 [ ! -e "$upper" ] || die "the upper is still there"
! lacks "$DEVICE" || die "a device was taken out of a machine that uses it"
stop two
wait_for 30 lacks "$DEVICE" || die "the device of the second container stays: $(fr list)"
forget_image "$REGISTRY/demo:packed"
clean() { [ -z "$(remains)" ]; }
wait_for 30 clean || die "left behind: $(remains)"
stop_pid "$qemu"
echo "what they wrote was in their snapshots, and is gone with them; nothing is left"
