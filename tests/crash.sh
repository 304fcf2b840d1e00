#!/usr/bin/env bash
# The daemon is killed (-9) at random moments while a mounted image is read. Each time: what was read before the kill is
# right or an error, and a daemon started again opens the pool and serves the right tree. ROUNDS (6) is how often.
set -euo pipefail
# shellcheck source=../scripts/lib.sh
. "$(dirname "$(readlink -f "$0")")/../scripts/lib.sh"

need_root
need_tools docker-registry skopeo getfattr jq
FIRSTREAD=${FIRSTREAD:-$TARGET/debug/firstread}
[ -x "$FIRSTREAD" ] || die "$FIRSTREAD is missing: cargo build"
begin crash

image=$("$REPO/scripts/image" small)
start_registry
push_layout "$image/layout" small:latest
use_node crash
fr build "$REGISTRY/small:latest" "$REGISTRY/small:packed" >>"$LOGS/build.log" 2>&1
mkdir "$FR_DIR/mnt"

contents() { (cd "$FR_DIR/mnt" && find . -xdev -type f -exec sha256sum {} +); }

# What is right, as served by a daemon that nobody kills; its pool is thrown away.
fr mount "$REGISTRY/small:packed" "$FR_DIR/mnt" >>"$LOGS/mount.log" 2>&1
tree_facts "$FR_DIR/mnt" >"$WORK/reference"
contents | sort >"$WORK/expected"
[ "$(wc -l <"$WORK/expected")" -gt 2000 ] || die "the tree is not whole"
drop_node
use_node crash

rounds=${ROUNDS:-6} passed=0
for ((round = 1; round <= rounds; round++)); do
    mkdir -p "$FR_DIR/mnt"
    fr mount "$REGISTRY/small:packed" "$FR_DIR/mnt" >>"$LOGS/mount.log" 2>&1
    drop_caches
    contents >"$WORK/read" 2>>"$LOGS/read.log" &
    reader=$!
    delay=0.$(printf %03d $((RANDOM % 400)))
    sleep "$delay"
    kill -KILL "$(daemon_pid)"
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
    release_under "$FR_DIR"
    passed=$((passed + 1))
    echo "ok      killed after $delay s, $(wc -l <"$WORK/read") files read"
done

# Whatever the kills have left of the pool, what is served from it is right.
fr mount "$REGISTRY/small:packed" "$FR_DIR/mnt" >>"$LOGS/mount.log" 2>&1
tree_facts "$FR_DIR/mnt" >"$WORK/facts"
diff "$WORK/reference" "$WORK/facts" | head -n 10 >&2 || true
cmp "$WORK/reference" "$WORK/facts"
fr umount "$FR_DIR/mnt" >>"$LOGS/mount.log" 2>&1
passed=$((passed + 1))
echo "ok      the pool after $rounds kills serves the right tree"
echo "$passed passed, 0 failed"
