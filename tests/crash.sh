#!/usr/bin/env bash
# The daemon is killed (-9) at random moments while it reads, evicts, pins and scrubs. Each time: what was read before the
# kill is right or an error, and a daemon started again opens the pool, holds the pin that was made, finds nothing damaged
# (a kill is no power loss), and serves every file right. ROUNDS (12) is how often; SEED repeats a run's delays.
set -euo pipefail
BUILT=debug
# shellcheck source=../scripts/lib.sh
. "$(dirname "$(readlink -f "$0")")/../scripts/lib.sh"

need_root
need_tools docker-registry skopeo getfattr jq
[ -x "$FIRSTREAD" ] || die "$FIRSTREAD is missing: cargo build"
begin crash
RANDOM=${SEED:=$((SECONDS + $$ % 30000))}
echo "seed $SEED"

image=$("$REPO/scripts/image" small)
start_registry
push_layout "$image/layout" small:latest
use_node crash
packed=$REGISTRY/small:packed kept=$REGISTRY/kept:packed
fr build "$REGISTRY/small:latest" "$packed" >>"$LOGS/build.log" 2>&1
mkdir "$FR_DIR/mnt" "$WORK/kept"
for ((i = 0; i < 12; i++)); do head -c $((RANDOM * 12 + 1)) /dev/urandom >"$WORK/kept/file-$i"; done
fr build "dir:$WORK/kept" "$kept" >>"$LOGS/build.log" 2>&1

contents() { (cd "$FR_DIR/mnt" && find . -xdev -type f -exec sha256sum {} +); }

# What is right, as served by a daemon that nobody kills; its pool is thrown away.
fr mount "$packed" "$FR_DIR/mnt" >>"$LOGS/mount.log" 2>&1
tree_facts "$FR_DIR/mnt" >"$WORK/reference"
contents | sort >"$WORK/expected"
[ "$(wc -l <"$WORK/expected")" -gt 2000 ] || die "the tree is not whole"
bytes=$(fr pool stat --json | jq .bytes)
drop_node
use_node crash
# Half of the image and what is pinned fit: everything is evicted again and again.
cat >"$WORK/config.toml" <<TEXT
[pool]
limit = "$((bytes / 2 + 5000000))"
keep_free = "0%"
scrub_rate = "20M"
TEXT
export FIRSTREAD_CONFIG=$WORK/config.toml

# again CMD…: runs a verb over and over as long as "lives" is there.
again() {
    while [ -e "$WORK/lives" ]; do
        fr "$@" --quiet >>"$LOGS/again.log" 2>&1 || true
        sleep 0.0$((RANDOM % 10))
    done
}
# Pins, and unpins again now and then. "pinned" is there while the pin holds.
pins() {
    while [ -e "$WORK/lives" ]; do
        if fr pin "$kept" --quiet >>"$LOGS/again.log" 2>&1; then touch "$WORK/pinned"; fi
        sleep 0.$((RANDOM % 3))
        if [ $((RANDOM % 3)) = 0 ] && [ -e "$WORK/lives" ]; then
            rm -f "$WORK/pinned"
            fr unpin "$kept" --quiet >>"$LOGS/again.log" 2>&1 || true
        fi
    done
}

# Every file is read and compared, every chunk of the pool is checked.
verify_all() {
    mkdir -p "$FR_DIR/mnt"
    fr mount "$packed" "$FR_DIR/mnt" >>"$LOGS/mount.log" 2>&1 || die "$1: the image can't be mounted; see $LOGS/mount.log"
    if [ -e "$WORK/pinned" ]; then
        fr verify --offline "$kept" >>"$LOGS/offline.log" 2>&1 || die "$1: what is pinned is not whole; see $LOGS/offline.log"
        held=$((held + 1))
    fi
    fr pool scrub --json >"$WORK/scrub.json" 2>>"$LOGS/scrub.log"
    jq -e '.damaged == 0 and .unreadable == 0' "$WORK/scrub.json" >/dev/null || die "$1: damaged chunks: $(cat "$WORK/scrub.json")"
    contents 2>>"$LOGS/read.log" | sort >"$WORK/read"
    cmp -s "$WORK/read" "$WORK/expected" || die "$1: the tree is not the same: $(diff "$WORK/read" "$WORK/expected" | head -n 3)"
}

rounds=${ROUNDS:-12} passed=0 evicted=0 held=0 scrubbed=0
verify_all "before"
for ((round = 1; round <= rounds; round++)); do
    pid=$(daemon_pid)
    drop_caches
    touch "$WORK/lives"
    contents >"$WORK/read" 2>>"$LOGS/read.log" &
    reader=$!
    pins &
    pinner=$!
    again pool scrub &
    scrubber=$!
    again pool trim "$((bytes / 3))" &
    trimmer=$!
    delay=$((RANDOM % 1500))
    sleep "$((delay / 1000)).$(printf %03d $((delay % 1000)))"
    stat=$(timeout 5 "$FIRSTREAD" --root "$FR_DIR/root" --run "$FR_DIR/run" pool stat --json 2>/dev/null) || stat='{}'
    # The verbs end in the middle of what the daemon does for them, and then the daemon.
    rm -f "$WORK/lives"
    for verbs in "$pinner" "$scrubber" "$trimmer"; do pkill -KILL -P "$verbs" || true; done
    kill -KILL "$pid"
    wait "$pinner" "$scrubber" "$trimmer" || true
    # The readers get errors; none may be left waiting.
    for ((i = 0; i < 300; i++)); do
        alive "$reader" || break
        sleep 0.1
    done
    if alive "$reader"; then
        stop_pid "$reader"
        die "round $round: a reader hangs after the daemon was killed"
    fi
    wait "$reader" || true
    if grep -E '^[0-9a-f]{64}  ' "$WORK/read" | sort | comm -23 - "$WORK/expected" | grep . >&2; then
        die "round $round: wrong data was read"
    fi
    files=$(wc -l <"$WORK/read")
    release_under "$FR_DIR"
    evicted=$((evicted + $(jq '.evicted // 0' <<<"$stat")))
    verify_all "round $round"
    scrubbed=$((scrubbed + $(jq .chunks "$WORK/scrub.json")))
    passed=$((passed + 1))
    echo "ok      killed after $delay ms, $files files read, $(jq .chunks "$WORK/scrub.json") chunks in the pool"
done
[ "$evicted" -gt 0 ] || die "nothing was evicted"
[ "$held" -gt 0 ] || die "nothing was pinned"

tree_facts "$FR_DIR/mnt" >"$WORK/facts"
diff "$WORK/reference" "$WORK/facts" | head -n 10 >&2 || true
cmp "$WORK/reference" "$WORK/facts"
fr umount "$FR_DIR/mnt" >>"$LOGS/mount.log" 2>&1
passed=$((passed + 1))
echo "ok      the pool after $rounds kills serves the right tree; $evicted chunks were evicted, $held times the pin held, $scrubbed chunks were checked"
echo "$passed passed, 0 failed"
