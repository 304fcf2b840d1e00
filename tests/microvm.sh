#!/usr/bin/env bash
# Virtual machines start from an image in a registry, over vhost-user-blk and before it is downloaded: QEMU with Debian's own
# kernel, whose daemon is killed on the way, also while it writes to its disk, and User Mode Linux. What each fetched until it was
# ready is printed.
set -euo pipefail
BUILT=debug
# shellcheck source=../scripts/lib.sh
. "$(dirname "$(readlink -f "$0")")/../scripts/lib.sh"

need_root
need_tools docker-registry skopeo qemu-system-x86_64 cpio xz jq sha256sum
[ -x "$FIRSTREAD" ] || die "$FIRSTREAD is missing: cargo build"
begin microvm
# shellcheck source=common/qemu.sh
. "$REPO/tests/common/qemu.sh"

# The initramfs mounts the disk, read-only as a VM without a writable disk does, or writable, and hands over.
make_initramfs() { # OPTIONS-OF-THE-MOUNT COMMAND: what the machine runs in the image
    {
        cat <<'INIT'
#!/bin/busybox sh
busybox=/bin/busybox
$busybox mount -t devtmpfs dev /dev
$busybox mount -t proc proc /proc
$busybox mount -t sysfs sys /sys
$busybox insmod /virtio_blk.ko
while ! [ -b /dev/vda ]; do $busybox sleep 0.1; done
echo "disk serial $($busybox cat /sys/block/vda/serial) ro $($busybox cat /sys/block/vda/ro) queues $($busybox ls /sys/block/vda/mq | $busybox wc -l)"
INIT
        printf '$busybox mount -t ext4 -o %s /dev/vda /lower\n' "$1"
        cat <<'INIT'
$busybox ifconfig lo 127.0.0.1 up
for dir in tmp run; do $busybox mount -t tmpfs tmpfs /lower/$dir; done
$busybox mount --move /proc /lower/proc
$busybox mount --move /sys /lower/sys
$busybox mount --move /dev /lower/dev
INIT
        printf 'exec %s chroot /lower /bin/sh -c %q\n' '$busybox' "$2"
    } >"$WORK/init"
    pack_initramfs "$WORK/init"
}
# A machine with $WORK/disk.sock as its disk.
start_machine() { # LOG
    start_qemu "$1" -object memory-backend-memfd,id=mem,size=1024M,share=on -numa node,memdev=mem \
        -chardev "socket,id=disk,path=$WORK/disk.sock,reconnect=1" -device vhost-user-blk-pci,chardev=disk,num-queues=2
}

# --- the image -----------------------------------------------------------------------------------------------------

debian_kernel
image=$("$REPO/scripts/image" demo)
start_registry
push_layout "$image/layout" demo:latest
use_node one
fr build "$REGISTRY/demo:latest" "$REGISTRY/demo:packed" --quiet --json >"$WORK/build.json"
stored=$(jq .stored_bytes "$WORK/build.json")
drop_node

# start_export SOCKET OPTION…: the image for VMMs, from this node; $EXPORT is its process.
start_export() {
    setsid "$FIRSTREAD" --root "$FR_DIR/root" --run "$FR_DIR/run" export "$REGISTRY/demo:packed" --vhost-user "$@" \
        >>"$LOGS/export.log" 2>&1 &
    EXPORT=$!
    defer stop_pid "$EXPORT"
    wait_for 20 test -S "$1" || die "the export did not start: $(tail -n 3 "$LOGS/export.log")"
}
# What the registry has sent of blobs so far, in bytes.
sent() { sed -n 's/.*method=GET.*\/blobs\/.*http.response.written=\([0-9]*\).*/\1/p' "$REGISTRY_LOG" | awk '{sum += $1} END {print sum + 0}'; }
# --- QEMU ----------------------------------------------------------------------------------------------------------

# The service answers a request of its own, reads files while the server is killed, and proves what it read.
cat >"$WORK/service.py" <<'PY'
import hashlib, http.server, os, threading, urllib.request
server = http.server.HTTPServer(("127.0.0.1", 8000), http.server.SimpleHTTPRequestHandler)
threading.Thread(target=server.serve_forever, daemon=True).start()
passwd = urllib.request.urlopen("http://127.0.0.1:8000/etc/passwd").read()
assert passwd.startswith(b"root:"), passwd
print("ready http", len(passwd), flush=True)
total, files = hashlib.sha256(), 0
for base in ["/usr/lib/python3", "/usr/local/lib", "/usr/share"]:
    for root, dirs, names in os.walk(base):
        dirs.sort()
        for name in sorted(names):
            path = os.path.join(root, name)
            if os.path.isfile(path) and not os.path.islink(path) and os.path.getsize(path) < 300000 and files < 1500:
                total.update(open(path, "rb").read())
                files += 1
                if files % 100 == 0:
                    print("reading", files, flush=True)
print("sum", total.hexdigest(), files, flush=True)
PY
code=$(base64 -w0 "$WORK/service.py")
# The same in a chroot here: what is right.
expected=$(chroot "$image/tree" /usr/bin/python3 -c "import base64; exec(base64.b64decode('$code'))" | sed -n 's/^sum //p')
[ "${#expected}" -gt 60 ] || die "the service does not run here"

use_node qemu
make_initramfs ro,noload "cd / && python3 -c \"import base64; exec(base64.b64decode('$code'))\"; sleep 1000"
start_export "$WORK/disk.sock"
before=$(sent) start=$(now)
start_machine "$LOGS/qemu.log"
console 240 'ready http' "$LOGS/qemu.log" "$qemu"
echo "QEMU: a service of the image is ready $(since "$start") s after the machine's start; $(mb $(($(sent) - before))) of $(mb "$stored") MB fetched"
grep -aq "disk serial $(fr inspect "$REGISTRY/demo:packed" --json | jq -r '.digest[7:27]') ro 1 queues 2" "$LOGS/qemu.log" ||
    die "the disk is not what was exported: $(grep -a disk "$LOGS/qemu.log")"

# The server dies with everything that it knew; QEMU keeps what was in flight for the next one.
console 120 'reading 100' "$LOGS/qemu.log" "$qemu"
for kill in 1 2 3; do
    kill -KILL "$(daemon_pid)"
    wait "$EXPORT" || true
    start_export "$WORK/disk.sock"
    console 120 "reading ${kill}00" "$LOGS/qemu.log" "$qemu"
    sleep 1
done
console 240 'sum' "$LOGS/qemu.log" "$qemu"
found=$(tr -d '\r' <"$LOGS/qemu.log" | sed -n 's/^sum //p')
[ "$found" = "$expected" ] || die "the machine read $found, not $expected"
! grep -aE 'I/O error|EXT4-fs error|blk_update_request' "$LOGS/qemu.log" >&2 || die "the machine saw errors"
echo "QEMU: the daemon was killed 3 times while the service read ${expected#* } files: no error, right data"
stop_pid "$qemu"
stop_pid "$EXPORT"

# The same machine with a disk that it can write to, larger than the image.
cat >"$WORK/writer.py" <<'PY'
import hashlib, os
room = os.statvfs("/")
print("room", room.f_blocks * room.f_frsize >> 20, flush=True)
os.mkdir("/written")
for number in range(40):
    with open(f"/written/{number}", "wb") as file:
        for piece in range(10):
            file.write(hashlib.sha512(b"%d.%d" % (number, piece)).digest() * 800)
            file.flush()
            os.fsync(file.fileno())
    print("written", number, flush=True)
with open("/etc/hostname", "a") as file:
    file.write("changed\n")
os.sync()
open("/proc/sys/vm/drop_caches", "w").write("3")
for number in range(40):
    expected = b"".join(hashlib.sha512(b"%d.%d" % (number, piece)).digest() * 800 for piece in range(10))
    assert open(f"/written/{number}", "rb").read() == expected, number
print("read back", flush=True)
PY
code=$(base64 -w0 "$WORK/writer.py")
make_initramfs rw,noatime "cd / && python3 -c \"import base64; exec(base64.b64decode('$code'))\" && mount -o remount,ro / && echo over; sleep 1000"
writable=(--upper "$WORK/upper" --size 3G)
start_export "$WORK/disk.sock" "${writable[@]}"
start_machine "$LOGS/qemu-writes.log"
console 240 'written 0' "$LOGS/qemu-writes.log" "$qemu"
room=$(tr -d '\r' <"$LOGS/qemu-writes.log" | sed -n 's/^room //p')
[ "$room" -gt 2800 ] || die "a disk of 3 GiB has a file system of $room MiB"
for kill in 1 2 3; do
    kill -KILL "$(daemon_pid)"
    wait "$EXPORT" || true
    start_export "$WORK/disk.sock" "${writable[@]}"
    console 120 "written ${kill}0" "$LOGS/qemu-writes.log" "$qemu"
done
console 240 'read back' "$LOGS/qemu-writes.log" "$qemu"
console 60 'over' "$LOGS/qemu-writes.log" "$qemu"
! grep -aE 'I/O error|EXT4-fs error|blk_update_request' "$LOGS/qemu-writes.log" >&2 || die "the machine saw errors"
stop_pid "$qemu"
stop_pid "$EXPORT"
device=$(fr attach --quiet --transport loop --upper "$WORK/upper" "$REGISTRY/demo:packed")
e2fsck -fn "$device" >"$LOGS/fsck.log" 2>&1 || die "what the machine wrote is damaged: $(cat "$LOGS/fsck.log")"
debugfs -R 'cat /etc/hostname' "$device" 2>/dev/null | grep -qx changed || die "what the machine wrote is not there"
fr detach "$device" >/dev/null
echo "QEMU: wrote 40 files to a disk of its own, 400 times synced; the daemon was killed 3 times: no error, right data, a clean file system"
drop_node

# --- User Mode Linux -----------------------------------------------------------------------------------------------

linux=$("$REPO/scripts/vm" kernel)
use_node uml
start_export "$WORK/back.sock"
setsid /usr/bin/python3 "$REPO/tests/vhost_user_trim.py" "$WORK/uml.sock" "$WORK/back.sock" >"$LOGS/trim.log" 2>&1 &
trim=$!
defer stop_pid "$trim"
wait_for 20 test -S "$WORK/uml.sock" || die "the proxy did not start: $(tail -n 3 "$LOGS/trim.log")"
before=$(sent) start=$(now)
mkdir "$WORK/uml"
# The image is the root file system; the application is its first program.
TMPDIR=/dev/shm setsid "$linux" mem=1G "virtio_uml.device=$WORK/uml.sock:2" root=/dev/vda rootfstype=ext4 ro rootwait \
    "uml_dir=$WORK/uml/" con=null con0=fd:0,fd:1 quiet panic=-1 init=/bin/sh -- \
    -c '"mount -t tmpfs tmpfs /tmp; export PATH=/usr/bin:/bin; PYTHONDONTWRITEBYTECODE=1 python3 /app/main.py; sleep 1000"' </dev/null >"$LOGS/uml.log" 2>&1 &
uml=$!
defer stop_pid "$uml"
console 240 'ready numpy' "$LOGS/uml.log" "$uml"
echo "UML: the application is ready $(since "$start") s after the machine's start; $(mb $(($(sent) - before))) of $(mb "$stored") MB fetched"
kill -KILL -- "-$uml" 2>/dev/null || true
wait "$uml" 2>/dev/null || true
