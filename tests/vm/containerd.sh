#!/bin/bash
# vm: --time 290 --mem 1500M
# containerd and runc over ublk: containers read an image, and write to a block device of their own, while the daemon is killed KILLS
# times and the snapshotter in between: no error, no wrong byte; afterwards nothing is left.
. "$REPO/tests/vm/guest/lib.sh"
. "$REPO/tests/common/containerd.sh"
KILLS=${KILLS:-6}
# runc wants a controller of devices, which this kernel has in the old hierarchies only.
umount /sys/fs/cgroup
mount -t tmpfs cgroups /sys/fs/cgroup
for name in devices freezer pids; do
    mkdir "/sys/fs/cgroup/$name"
    mount -t cgroup -o "$name" "$name" "/sys/fs/cgroup/$name"
done
# Overlays can't lie on this machine's /tmp, which is one.
WORK=/run/vm-node
mkdir -p "$WORK/mnt"

# --- an image with a shell and something to read, in a registry ------------------------------------------------------

mkdir -p "$WORK"/tree/{bin,data,proc,sys,dev,etc,tmp,run}
for program in dash cat sha256sum sleep dd rm sync; do
    path=$(readlink -f "$(command -v "$program")")
    cp "$path" "$WORK/tree/bin/$program"
    ldd "$path" | grep -o '/[^ ]*' | while read -r library; do
        mkdir -p "$WORK/tree${library%/*}"
        cp -L "$library" "$WORK/tree$library"
    done
done
mv "$WORK/tree/bin/dash" "$WORK/tree/bin/sh"
echo 'root:x:0:0::/:/bin/sh' >"$WORK/tree/etc/passwd"
echo 'root:x:0:' >"$WORK/tree/etc/group"
for number in 1 2 3 4 5 6; do
    head -c 1500000 <(openssl enc -aes-128-ctr -K "0$number" -iv 0 -nosalt -in /dev/zero 2>/dev/null) >"$WORK/tree/data/$number"
done
(cd "$WORK/tree" && sha256sum data/*) >"$WORK/sums"
cp "$WORK/sums" "$WORK/tree/sums"
cat >"$WORK/registry.yml" <<YML
version: 0.1
log: {level: error, accesslog: {disabled: true}}
storage: {filesystem: {rootdirectory: $WORK/registry}}
http: {addr: "127.0.0.1:5000"}
YML
docker-registry serve "$WORK/registry.yml" >"$WORK/registry.log" 2>&1 &
answers() { (exec 3<>/dev/tcp/127.0.0.1/5000) 2>/dev/null; }
until_true 30 answers || die "the registry does not answer: $(cat "$WORK/registry.log")"
IMAGE=127.0.0.1:5000/app:1
fr build --quiet "dir:$WORK/tree" "$IMAGE" >/dev/null

# --- containerd ------------------------------------------------------------------------------------------------------

mkdir "$WORK/containerd"
containerd_config "$WORK/containerd" "$WORK/snapshotter.sock" >"$WORK/containerd.toml"
containerd -c "$WORK/containerd.toml" >"$WORK/containerd.log" 2>&1 &
ctr() { command ctr -a "$WORK/containerd/sock" "$@"; }
until_true 30 eval 'ctr version >/dev/null 2>&1' || die "containerd does not answer: $(tail -n 3 "$WORK/containerd.log")"
start_snapshotter() {
    "$FIRSTREAD" --root "$WORK/root" --run "$WORK/run" snapshotter --transport ublk --listen "$WORK/snapshotter.sock" \
        --containerd "$WORK/containerd/sock" >>"$WORK/snapshotter.log" 2>&1 &
    snapshotter=$!
    until_true 20 eval 'ctr snapshots --snapshotter firstread ls >/dev/null 2>&1' || die "no snapshotter: $(tail -n 3 "$WORK/snapshotter.log")"
}
start_daemon
start_snapshotter
fr pull --quiet --containerd "$WORK/containerd/sock" "$IMAGE" >/dev/null

# --- containers on one device, and one with its own ----------------------------------------------------------------------

# The kernel has no controller of processors, and containerd always asks for shares of them.
cat >"$WORK/runc" <<'RUNC'
#!/bin/bash
for ((at = 1; at < $#; at++)); do
    next=$((at + 1))
    [ "${!at}" = --bundle ] || continue
    spec=${!next}/config.json
    jq 'del(.linux.resources.cpu)' "$spec" >"$spec.new" && mv "$spec.new" "$spec"
done
exec runc "$@"
RUNC
chmod +x "$WORK/runc"
run=(run --net-host --runc-binary "$WORK/runc" --snapshotter firstread)
# shellcheck disable=SC2016 # for the containers
checks='while sha256sum --quiet --strict -c /sums; do echo checked; done; echo failed'
# shellcheck disable=SC2016
writes='number=0; while :; do number=$((number + 1))
    dd if=/data/$((number % 6 + 1)) of=/written bs=100k conv=fsync 2>/tmp/dd && sync &&
    [ "$(sha256sum </written)" = "$(sha256sum </data/$((number % 6 + 1)))" ] || { echo failed; exit; }; echo written; done'
ctr "${run[@]}" "$IMAGE" reader sh -c "$checks" >"$WORK/reader" 2>&1 &
ctr "${run[@]}" --snapshotter-label containerd.io/snapshot/firstread/mount=block "$IMAGE" writer sh -c "$writes" >"$WORK/writer" 2>&1 &
begun() { grep -q checked "$WORK/reader" && grep -q written "$WORK/writer"; }
until_true 90 begun || die "the containers do nothing: $(head -n 5 "$WORK/reader" "$WORK/writer")"
[ "$(fr list --json | jq -r 'map(.transport) | join(" ")')" = "ublk ublk" ] || die "$(fr list)"
[ "$(fr list --json | jq 'map(select(.read_only)) | length')" = 1 ] || die "$(fr list)"

fr list --json | jq 'map({id, device})' >"$WORK/before"
all_served() { [ "$(fr list --json 2>/dev/null | jq -r 'map(.state) | join(" ")')" = "attached attached" ]; }
disown -a
for ((kill = 1; kill <= KILLS; kill++)); do
    sleep "0.$((RANDOM % 10))"
    kill -KILL "$(daemon_pid)"
    if ((kill % 2)); then
        kill -KILL "$snapshotter"
        start_server
        start_snapshotter
    else
        start_server
    fi
    until_true 30 all_served || die "kill $kill: not served again: $(fr list)"
    disown -a
    drop_caches
    lines=$(cat "$WORK/reader" "$WORK/writer" | wc -l)
    moved() { [ "$(cat "$WORK/reader" "$WORK/writer" | wc -l)" -gt $((lines + 2)) ]; }
    until_true 40 moved || die "kill $kill: the containers stand still"
done
! grep -hvE '^(checked|written)$' "$WORK/reader" "$WORK/writer" || die "a container saw an error"
fr list --json | jq 'map({id, device})' >"$WORK/after"
diff "$WORK/before" "$WORK/after" || die "the devices are others"
# A new container joins.
[ "$(ctr "${run[@]}" --rm "$IMAGE" third sh -c 'sha256sum --quiet --strict -c /sums && echo right')" = right ] || die "a third container"
echo "$KILLS kills under two containers: checked $(grep -c checked "$WORK/reader") times, written $(grep -c written "$WORK/writer") times, no error"

# --- nothing is left -----------------------------------------------------------------------------------------------------

for id in reader writer; do
    ctr task kill -s KILL "$id"
    ended() { ctr task rm -f "$id" >/dev/null 2>&1 || ! ctr task ls -q | grep -qx "$id"; }
    until_true 20 ended || die "$id does not end"
    ctr containers rm "$id"
done
ctr images rm --sync "$IMAGE" >/dev/null
state=$WORK/root/snapshotter/default
clean() {
    [ "$(fr list --json)" = "[]" ] && ! grep -qF " $state" /proc/self/mountinfo &&
        [ -z "$(find "$state"/{snapshots,removed,new} -mindepth 1 -maxdepth 1)" ]
}
until_true 30 clean || die "left: $(fr list) $(grep -F " $state" /proc/self/mountinfo) $(find "$state"/{snapshots,removed,new} -mindepth 1 -maxdepth 1)"
! ls /dev/ublk[bc]* 2>/dev/null || die "devices are left"
! dmesg | grep -E 'WARNING|BUG|Oops|I/O error|EXT4-fs error|hung task' || die "the kernel complained"
echo "containers, image and devices are gone"
