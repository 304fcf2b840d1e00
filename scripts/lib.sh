# shellcheck shell=bash
# Shell functions of the demo, the benchmark and the tests: a private registry, containerd and shaped network that are
# taken down again on every way out. Source it, then call `begin NAME`. Nothing here touches the machine's own network,
# containerd or registry: both ends of the network are namespaces, and all state is below one temporary directory.
#
# Functions that start something set variables instead of printing, so that they run in the caller's shell and their
# undoing lands on its stack.

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
TARGET=${CARGO_TARGET_DIR:-$REPO/target}
# shellcheck source=../tests/common/containerd.sh
. "$REPO/tests/common/containerd.sh"
ORIGIN_IP=10.213.77.1 # the registry's end, inside its own namespace
NODE_IP=10.213.77.2

die() {
    echo "$(basename "$0"): $*" >&2
    exit 1
}

need_root() { [ "$(id -u)" = 0 ] || die "needs root: it makes network namespaces and mounts"; }

need_tools() {
    local tool missing=()
    for tool in "$@"; do command -v "$tool" >/dev/null || missing+=("$tool"); done
    [ ${#missing[@]} = 0 ] || die "missing: ${missing[*]}; run scripts/setup"
}

# --- cleanup stack -------------------------------------------------------------------------------------------------

CLEANUP=()
# defer CMD ARG…: runs at exit, last one first, whatever the exit.
defer() {
    local line
    printf -v line '%q ' "$@"
    CLEANUP+=("$line")
}

# begin NAME: makes $WORK and $LOGS and arms the cleanup.
begin() {
    WORK=$(mktemp -d "${TMPDIR:-/tmp}/firstread-$1-XXXXXX")
    LOGS=$WORK/log
    mkdir "$LOGS"
    trap finish EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    trap 'exit 129' HUP
}

finish() {
    local rc=$? i
    trap - EXIT
    trap '' INT TERM HUP
    set +e
    # Mounts first, then the daemons behind them, then what those need.
    release_under "$WORK" >>"$LOGS/cleanup.log" 2>&1
    for i in "$WORK"/node-*/; do stop_node "${i%/}"; done
    for ((i = ${#CLEANUP[@]} - 1; i >= 0; i--)); do eval "${CLEANUP[i]}" >>"$LOGS/cleanup.log" 2>&1; done
    release_under "$WORK" >>"$LOGS/cleanup.log" 2>&1
    if [ "$rc" -eq 0 ] || [ "$rc" -eq 130 ]; then
        rm -rf --one-file-system "$WORK"
    else
        # Only the logs are worth keeping.
        find "$WORK" -mindepth 1 -maxdepth 1 -not -path "$LOGS" -exec rm -rf --one-file-system {} +
        echo "failed (exit $rc); logs: $LOGS" >&2
    fi
    exit "$rc"
}

# Ends one process that this script started: asks, waits five seconds, insists.
stop_pid() {
    local pid=$1 i
    kill -TERM "$pid" 2>/dev/null || return 0
    for ((i = 0; i < 50; i++)); do
        alive "$pid" || return 0
        sleep 0.1
    done
    kill -KILL "$pid" 2>/dev/null || true
}

stop_pidfile() {
    [ -s "$1" ] || return 0
    stop_pid "$(cat "$1")"
    rm -f "$1"
}

# A zombie does not count.
alive() { kill -0 "$1" 2>/dev/null && [ "$(awk '{print $3}' "/proc/$1/stat" 2>/dev/null)" != Z ]; }

# Undoes every mount and loop device below a directory. Loop devices go asynchronously, hence the retries.
release_under() {
    local dir=$1 try point loop back
    for try in 1 2 3 4 5; do
        while IFS= read -r point; do
            umount "$point" 2>/dev/null || { [ "$try" -lt 4 ] || umount -l "$point"; }
        done < <(awk -v d="$dir/" 'index($5 "/", d) == 1 {print $5}' /proc/self/mountinfo | sort -r)
        while read -r loop back; do
            case $back in "$dir"/*) losetup -d "$loop" 2>/dev/null ;; esac
        done < <(losetup -n -O NAME,BACK-FILE 2>/dev/null)
        awk -v d="$dir/" 'index($5 "/", d) == 1 {found = 1} END {exit !found}' /proc/self/mountinfo || return 0
        sleep 0.3
    done
}

# --- time ----------------------------------------------------------------------------------------------------------

now() { echo "${EPOCHREALTIME/,/.}"; }
since() { awk -v a="$1" -v b="$(now)" 'BEGIN {printf "%.3f", b - a}'; }
calc() { awk "BEGIN {printf \"${2:-%.3f}\", $1}"; }
mb() { calc "$1 / 1e6" "%.1f"; }

# wait_for SECONDS CMD…: until the command succeeds.
wait_for() {
    local end=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        [ "$SECONDS" -lt "$end" ] || return 1
        sleep 0.05
    done
}

drop_caches() {
    sync
    echo 3 >/proc/sys/vm/drop_caches
}

# until_ready START LOG CMD…: runs the command to its end; $READY is the time from START to its line "ready …".
until_ready() {
    local start=$1 log=$2 line
    shift 2
    rm -f "$WORK/ready"
    "$@" 2>>"$log" | while IFS= read -r line; do
        case $line in ready*) since "$start" >"$WORK/ready" ;; esac
        echo "$line" >>"$log"
    done
    [ -s "$WORK/ready" ] || { echo "no ready line; see $log" >&2; return 1; }
    READY=$(cat "$WORK/ready")
}

# --- network -------------------------------------------------------------------------------------------------------

# make_network: two namespaces, $ORIGIN (the registry's) and $NODE (the container machine's), joined by a cable.
make_network() {
    ORIGIN=fr-origin-$$
    NODE=fr-node-$$
    local ns
    for ns in "$ORIGIN" "$NODE"; do
        ip netns add "$ns"
        defer ip netns del "$ns"
        ip -n "$ns" link set lo up
    done
    ip -n "$ORIGIN" link add cable type veth peer name cable netns "$NODE"
    ip -n "$ORIGIN" addr add "$ORIGIN_IP/30" dev cable
    ip -n "$NODE" addr add "$NODE_IP/30" dev cable
    ip -n "$ORIGIN" link set cable up
    ip -n "$NODE" link set cable up
}

# shape RATE: limits the cable in both directions (100mbit, 1gbit, …); `shape off` takes the limit away.
shape() {
    local ns
    for ns in "$ORIGIN" "$NODE"; do
        tc -n "$ns" qdisc del dev cable root 2>/dev/null || true
        [ "$1" = off ] || tc -n "$ns" qdisc add dev cable root tbf rate "$1" burst 128kb latency 100ms
    done
}

# Runs a command in a namespace's network only: `ip netns exec` would hide the mounts that it makes.
in_ns() {
    local ns=$1
    shift
    nsenter "--net=/run/netns/$ns" -- "$@"
}

# What the node has received so far, in bytes of Ethernet frames.
node_received() { in_ns "$NODE" awk '$1 == "cable:" {print $2}' /proc/net/dev; }

# What the origin has put on the shaped cable so far, in bytes of Ethernet frames. (The node counts less: its kernel joins
# segments before it counts them.)
cable_sent() { tc -n "$ORIGIN" -s -j qdisc show dev cable root | jq '[.[].bytes] | add'; }

# --- registry ------------------------------------------------------------------------------------------------------

# start_registry [NAME]: docker-registry on loopback, or, after make_network, in the origin's namespace. Sets
#   $REGISTRY        HOST:PORT beside it (loopback), for pushing and converting
#   $REGISTRY_NODE   HOST:PORT from the node
#   $REGISTRY_DATA   its storage
#   $REGISTRY_LOG    its log, with one line a request
start_registry() {
    local name=${1:-registry} addr=127.0.0.1:0 run=()
    if [ -n "${ORIGIN:-}" ]; then
        addr=0.0.0.0:5000
        run=(nsenter "--net=/run/netns/$ORIGIN" --)
    fi
    REGISTRY_DATA=$WORK/$name
    REGISTRY_LOG=$LOGS/$name.log
    mkdir -p "$REGISTRY_DATA"
    cat >"$WORK/$name.yml" <<YML
version: 0.1
log: {level: info, accesslog: {disabled: true}}
storage: {filesystem: {rootdirectory: $REGISTRY_DATA}, delete: {enabled: true}}
http: {addr: "$addr"}
YML
    # A session of its own: Ctrl-C is for the script, which stops its servers in order.
    setsid "${run[@]}" docker-registry serve "$WORK/$name.yml" >"$REGISTRY_LOG" 2>&1 &
    REGISTRY_PID=$!
    defer stop_pid "$REGISTRY_PID"
    wait_for 10 grep -q 'listening on' "$REGISTRY_LOG" || die "docker-registry did not start: $(tail -n 1 "$REGISTRY_LOG")"
    local port
    port=$(sed -n 's/.*listening on [^ "]*:\([0-9]*\).*/\1/p' "$REGISTRY_LOG" | head -n 1)
    REGISTRY=127.0.0.1:$port
    REGISTRY_NODE=$REGISTRY
    [ -z "${ORIGIN:-}" ] || REGISTRY_NODE=$ORIGIN_IP:$port
}

# Runs a command where the registry is on loopback.
at_registry() {
    if [ -n "${ORIGIN:-}" ]; then in_ns "$ORIGIN" "$@"; else "$@"; fi
}

# push_layout LAYOUT REPOSITORY:TAG, unchanged.
push_layout() {
    at_registry skopeo copy --quiet --preserve-digests --dest-tls-verify=false "oci:$1:latest" "docker://$REGISTRY/$2" \
        >>"$LOGS/push.log" 2>&1
}

# push_blob FILE REPOSITORY: any file as a blob of the registry, for clients of plain HTTP. Sets $BLOB_PATH.
push_blob() {
    local digest location
    digest=sha256:$(sha256sum "$1" | cut -d' ' -f1)
    location=$(at_registry curl -sS -i -X POST "http://$REGISTRY/v2/$2/blobs/uploads/" | tr -d '\r' | sed -n 's/^[Ll]ocation: //p')
    at_registry curl -sS --fail -o /dev/null -X PUT -H 'Content-Type: application/octet-stream' -T "$1" "$location&digest=$digest"
    BLOB_PATH=/v2/$2/blobs/$digest
}

# Where the registry keeps a blob.
blob_file() { echo "$REGISTRY_DATA/docker/registry/v2/blobs/sha256/$(cut -c8-9 <<<"$1")/${1#sha256:}/data"; }

# flip_byte FILE OFFSET: turns one byte into another; a second time turns it back.
flip_byte() {
    local was
    was=$(od -An -tu1 -j "$2" -N 1 "$1" | tr -d ' ')
    printf '%b' "\\x$(printf %02x $((was ^ 0xff)))" | dd of="$1" bs=1 seek="$2" conv=notrunc status=none
}

# The sum of the layers of an image in a layout, as stored.
layout_bytes() {
    local blobs=$1/blobs/sha256 manifest
    manifest=$(jq -r '.manifests[0].digest' "$1/index.json")
    jq '[.layers[].size] | add' "$blobs/${manifest#sha256:}"
}

# --- containerd ----------------------------------------------------------------------------------------------------

# start_containerd: a private one (in the node's namespace if there is a network). $CTR is its client as an array.
start_containerd() {
    local run=() dir=$WORK/containerd
    [ -z "${NODE:-}" ] || run=(nsenter "--net=/run/netns/$NODE" --)
    mkdir -p "$dir"
    containerd_config "$dir" "$WORK/snapshotter.sock" >"$dir/config.toml"
    setsid "${run[@]}" containerd -c "$dir/config.toml" >"$LOGS/containerd.log" 2>&1 &
    CONTAINERD_PID=$!
    defer stop_containerd
    CTR=("${run[@]}" ctr -a "$dir/sock")
    wait_for 20 "${CTR[@]}" version || die "containerd did not start: $(tail -n 1 "$LOGS/containerd.log")"
}

stop_containerd() {
    local id
    alive "$CONTAINERD_PID" || return 0
    for id in $("${CTR[@]}" task ls -q); do "${CTR[@]}" task kill -s KILL "$id"; done
    for id in $("${CTR[@]}" task ls -q); do "${CTR[@]}" task rm -f "$id"; done
    for id in $("${CTR[@]}" containers ls -q); do "${CTR[@]}" containers rm "$id"; done
    stop_pid "$CONTAINERD_PID"
}

# start_snapshotter ARG…: the one of the node in use, for the containerd that runs. Sets $SNAPSHOTTER_PID; stopped at exit.
start_snapshotter() {
    local run=()
    [ -z "${NODE:-}" ] || run=(nsenter "--net=/run/netns/$NODE" --)
    setsid "${run[@]}" "$FIRSTREAD" --root "$FR_DIR/root" --run "$FR_DIR/run" snapshotter --plain-http \
        --listen "$WORK/snapshotter.sock" --containerd "$WORK/containerd/sock" "$@" >>"$LOGS/snapshotter.log" 2>&1 &
    SNAPSHOTTER_PID=$!
    defer stop_pid "$SNAPSHOTTER_PID"
    # containerd waits between its tries to reach it; a list of nothing would not ask it at all.
    wait_for 20 "${CTR[@]}" snapshot --snapshotter firstread prepare probe || die "the snapshotter did not start: $(tail -n 1 "$LOGS/snapshotter.log")"
    "${CTR[@]}" snapshot --snapshotter firstread rm probe
}

# Forgets an image and everything that was pulled for it.
forget_image() {
    "${CTR[@]}" image rm --sync "$1" >/dev/null 2>&1 || true
    "${CTR[@]}" content prune references >/dev/null 2>&1 || true
}

# --- the application -----------------------------------------------------------------------------------------------

# chroot_app ROOT: the demo image's entry point over a root file system mounted at ROOT, as its config says: in a
# writable overlay, as nobody. Mounts stay until release_under.
chroot_app() {
    local root=$1 over
    over=$(mktemp -d "$WORK/overlay-XXXXXX")
    mkdir "$over/upper" "$over/work" "$over/merged"
    mount -t overlay firstread-run -o "lowerdir=$root,upperdir=$over/upper,workdir=$over/work" "$over/merged"
    # No name is looked up: the numbers are nobody's and nogroup's.
    chroot --userspec=65534:65534 --groups=65534 "$over/merged" /usr/bin/env -i PATH=/usr/local/bin:/usr/bin:/bin PYTHONUNBUFFERED=1 \
        PYTHONDONTWRITEBYTECODE=1 python3 /app/main.py
}

# --- firstread -----------------------------------------------------------------------------------------------------

# What is measured is what readers and start-up packs cause; `all` adds the background fill of images without a pack.
export FIRSTREAD_FETCH_PREFETCH=${FIRSTREAD_FETCH_PREFETCH:-startup}

# The program under test, as it is on disk (FIRSTREAD overrides). Tests say BUILT=debug before they source this: what is measured is
# built with optimisations, what is tested is what cargo built last.
FIRSTREAD=${FIRSTREAD:-$TARGET/${BUILT:-release}/firstread}

# use_node NAME: a fresh node: own pool, own daemon, stopped at exit. `fr VERB…` speaks to it in the node's network.
use_node() {
    FR_DIR=$WORK/node-$1
    mkdir -p "$FR_DIR/root" "$FR_DIR/run"
}
fr() {
    local run=()
    [ -z "${NODE:-}" ] || run=(nsenter "--net=/run/netns/$NODE" --)
    "${run[@]}" "$FIRSTREAD" --root "$FR_DIR/root" --run "$FR_DIR/run" "$@"
}
stop_node() {
    [ -d "$1/run" ] || return 0
    timeout 20 "$FIRSTREAD" --root "$1/root" --run "$1/run" stop >>"$LOGS/stop.log" 2>&1 || true
    # One that does not listen any more; the number in a stale file may be another program's by now.
    local pid
    pid=$(cat "$1/run/daemon.pid" 2>/dev/null) || return 0
    case $(readlink "/proc/$pid/exe" 2>/dev/null) in *firstread*) stop_pid "$pid" ;; esac
}
# drop_node: stops it and forgets its pool.
drop_node() {
    release_under "$FR_DIR"
    stop_node "$FR_DIR"
    rm -rf --one-file-system "$FR_DIR"
}
# The daemon's process id.
daemon_pid() { cat "$FR_DIR/run/daemon.pid"; }

# tree_facts DIR: every node below a mounted tree with all that must be the same in another one, a line each: path, type,
# mode, owner, links, size, ns mtime, link target; then the contents' digests and the extended attributes (without
# trusted ones, which containerd does not set).
tree_facts() {
    (
        cd "$1" || exit
        export LC_ALL=C
        # A directory's size and link count are its file system's own matter, and the root's time that of the mount.
        stat -c '%a %u:%g .' .
        find . -xdev -name lost+found -prune -o -path . -o -type d -printf '%p %y %m %U:%G %T@\n' -o -printf '%p %y %m %U:%G %n %s %T@ %l\n' | sort
        find . -xdev -type f -print0 | sort -z | xargs -0 -r sha256sum
        find . -xdev -name lost+found -prune -o -print0 | sort -z | xargs -0 -r getfattr -h -d -m '^(user|security|system)[.]' -e hex --
    )
}

# --- the measured starts -------------------------------------------------------------------------------------------
# Each begins with nothing local and dropped caches, and sets $READY (seconds from the first request to the ready line)
# and $RECEIVED (bytes that crossed the cable until then).

# start_full REPOSITORY:TAG: containerd pulls everything, unpacks, runs.
start_full() {
    local ref=$REGISTRY_NODE/$1 before start
    forget_image "$ref"
    drop_caches
    before=$(node_received)
    start=$(now)
    until_ready "$start" "$LOGS/full.log" pull_and_run "$ref"
    RECEIVED=$(($(node_received) - before))
}
pull_and_run() {
    "${CTR[@]}" image pull --plain-http "$1" >>"$LOGS/pull.log" 2>&1
    PULLED=$(now)
    echo "$PULLED" >"$WORK/pulled"
    "${CTR[@]}" run --rm --net-host "$1" "app-$RANDOM$RANDOM"
}

# start_lazy REPOSITORY:TAG: firstread mounts, the application runs over the mount. Leaves the mount at $MOUNT, in the
# node's state $FR_DIR; its description is in $WORK/mount.json.
start_lazy() {
    local ref=$REGISTRY_NODE/$1 before start
    use_node "lazy-$RANDOM"
    MOUNT=$FR_DIR/mnt
    mkdir "$MOUNT"
    drop_caches
    before=$(node_received)
    start=$(now)
    until_ready "$start" "$LOGS/lazy.log" mount_and_run "$ref"
    RECEIVED=$(($(node_received) - before))
}
mount_and_run() {
    fr mount --plain-http --json "$1" "$MOUNT" >"$WORK/mount.json" 2>>"$LOGS/mount.log"
    chroot_app "$MOUNT"
}
