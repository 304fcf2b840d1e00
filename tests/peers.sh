#!/usr/bin/env bash
# The whole path with the programs as they are, against peers as they are: a registry, skopeo, containerd, libnbd, QEMU.
# containerd's own unpacking of the source image is the reference for every node of the packed one.
set -euo pipefail
BUILT=debug
# shellcheck source=../scripts/lib.sh
. "$(dirname "$(readlink -f "$0")")/../scripts/lib.sh"

need_root
need_tools docker-registry skopeo containerd ctr nbdinfo nbdcopy qemu-img e2fsck getfattr jq
[ -x "$FIRSTREAD" ] || die "$FIRSTREAD is missing: cargo build"
begin peers

passed=0 failed=0
# check NAME CMD…: a test; what it printed is shown when it fails.
check() {
    local name=$1
    shift
    # Not inside a condition: there bash would go on after a failed command.
    set +e
    (set -e; "$@") >"$LOGS/check.log" 2>&1
    local rc=$?
    set -e
    if [ "$rc" = 0 ]; then
        passed=$((passed + 1))
        echo "ok      $name"
    else
        failed=$((failed + 1))
        echo "FAILED  $name"
        tail -n 20 "$LOGS/check.log" | cut -c1-300 | sed 's/^/        | /'
    fi
}
# holds FILTER FILE: jq says true, and there was something to say it of.
holds() { [ "$(jq "$1" "$2")" = true ]; }
same() { diff "$WORK/reference" "$1"; }

image=$("$REPO/scripts/image" small)
start_registry first
first=$REGISTRY first_log=$REGISTRY_LOG first_data=$REGISTRY_DATA
push_layout "$image/layout" small:latest
start_containerd
"${CTR[@]}" image pull --plain-http "$first/small:latest" >"$LOGS/reference.log" 2>&1
mkdir "$WORK/reference-tree"
"${CTR[@]}" image mount "$first/small:latest" "$WORK/reference-tree" >>"$LOGS/reference.log" 2>&1
tree_facts "$WORK/reference-tree" >"$WORK/reference"
umount "$WORK/reference-tree"
[ "$(wc -l <"$WORK/reference")" -gt 4000 ] || die "the reference tree is not whole"

use_node one
mkdir "$WORK/mnt"
fr build "$first/small:latest" "$first/small:packed" --json >"$WORK/build.json"

# --- the device ----------------------------------------------------------------------------------------------------

mounted_tree() { tree_facts "$WORK/mnt" >"$WORK/facts" && same "$WORK/facts"; }
fr mount "$first/small:packed" "$WORK/mnt" --json >"$WORK/mount.json"
id=$(jq -r .id "$WORK/mount.json")
check "the mounted tree equals containerd's, node by node" mounted_tree
some_local() { fr status "$id" --json >"$WORK/status.json" && holds '.chunks.fetched > 0 and .verify_failures == 0' "$WORK/status.json"; }
check "status counts what was fetched" some_local
fr umount "$WORK/mnt"

blob_gets() { grep -c 'method=GET.*/blobs/' "$first_log" || true; }
restart() {
    fr stop
    local before pack
    before=$(blob_gets)
    fr mount "$first/small:packed" "$WORK/mnt"
    tree_facts "$WORK/mnt" >"$WORK/facts"
    fr umount "$WORK/mnt"
    same "$WORK/facts"
    fr inspect "$first/small:packed" --json >"$WORK/inspect.json"
    # The manifest and the index may be asked for again; a pack may not.
    for pack in $(jq -r '.packs[].digest' "$WORK/inspect.json"); do
        ! tail -n "+$((before + 1))" <(grep 'method=GET.*/blobs/' "$first_log") | grep "$pack" || return 1
    done
}
check "after a restart nothing is fetched again" restart

# --- NBD -----------------------------------------------------------------------------------------------------------

socket=$WORK/export.sock uri="nbd+unix:///?socket=$WORK/export.sock"
setsid "$FIRSTREAD" --root "$FR_DIR/root" --run "$FR_DIR/run" export "$first/small:packed" --nbd "unix:$socket" >"$LOGS/export.log" 2>&1 &
export_pid=$!
defer stop_pid "$export_pid"
wait_for 20 test -S "$socket" || die "the export did not start: $(tail -n 3 "$LOGS/export.log")"
nbd_info() {
    local bytes
    bytes=$(fr inspect "$first/small:packed" --json | jq .device_bytes)
    nbdinfo --json "$uri" | tee "$WORK/nbdinfo.json"
    holds ".exports[0] | .\"export-size\" == $bytes and .is_read_only" "$WORK/nbdinfo.json"
    nbdinfo --map "$uri"
}
nbd_copy() {
    nbdcopy "$uri" "$WORK/device.img"
    e2fsck -fn "$WORK/device.img"
    mount -o ro,loop "$WORK/device.img" "$WORK/mnt"
    tree_facts "$WORK/mnt" >"$WORK/facts"
    umount "$WORK/mnt"
    same "$WORK/facts"
}
check "nbdinfo: size, read-only, map" nbd_info
check "nbdcopy: a sound file system with the same tree" nbd_copy
check "qemu-img compare: the export equals the copy" qemu-img compare -f raw -F raw "$uri" "$WORK/device.img"
stop_pid "$export_pid"

# --- copies and other clients --------------------------------------------------------------------------------------

start_registry second
second=$REGISTRY
manifest() { skopeo inspect --raw --tls-verify=false "docker://$1" | sha256sum; }
copy_through_layout() {
    skopeo copy --quiet --src-tls-verify=false "docker://$first/small:packed" "oci:$WORK/copied:packed"
    skopeo copy --quiet --dest-tls-verify=false "oci:$WORK/copied:packed" "docker://$second/moved:packed"
    [ "$(manifest "$first/small:packed")" = "$(manifest "$second/moved:packed")" ]
    skopeo inspect --raw --tls-verify=false "docker://$second/moved:packed" >"$WORK/manifest.json"
    holds '[.layers[].annotations // {} | keys[] | select(startswith("containerd.io/snapshot/firstread"))] | length > 0' "$WORK/manifest.json"
}
mount_source() { # REF: with an empty pool
    use_node "copy-$RANDOM"
    fr mount "$1" "$WORK/mnt"
    tree_facts "$WORK/mnt" >"$WORK/facts"
    fr umount "$WORK/mnt"
    stop_node "$FR_DIR"
    same "$WORK/facts"
}
same_config() {
    skopeo inspect --config --tls-verify=false "docker://$first/small:latest" | jq -S .config >"$WORK/config.source"
    skopeo inspect --config --tls-verify=false "docker://$first/small:packed" | jq -S .config >"$WORK/config.packed"
    diff "$WORK/config.source" "$WORK/config.packed"
}
ctr_pull() {
    "${CTR[@]}" image pull --plain-http "$first/small:packed"
    "${CTR[@]}" image check "name==$first/small:packed" | grep 'complete'
}
check "skopeo copy, registry → layout → empty registry: digest and annotations kept" copy_through_layout
check "the copy in the other registry mounts" mount_source "$second/moved:packed"
check "the copy in the layout mounts" mount_source "oci:$WORK/copied:packed"
check "skopeo inspect: the image's config is the source's" same_config
check "ctr image pull: another snapshotter unpacks every layer" ctr_pull

# --- a lying registry ----------------------------------------------------------------------------------------------

flipped() {
    local pack size file
    read -r pack size < <(jq -r '.packs | max_by(.stored_bytes) | "\(.digest) \(.stored_bytes)"' "$WORK/inspect.json")
    REGISTRY_DATA=$first_data
    file=$(blob_file "$pack")
    flip_byte "$file" $((size / 2))
    use_node flipped
    fr mount "$first/small:packed" "$WORK/mnt" --json >"$WORK/mount.json"
    (cd "$WORK/mnt" && find . -xdev -type f -exec sha256sum {} +) 2>"$WORK/errors" | sort >"$WORK/read" || true
    cat "$WORK/errors"
    grep 'Input/output error' "$WORK/errors"
    # Whatever could be read is right.
    (grep -E '^[0-9a-f]{64}  ' "$WORK/reference" | sort) >"$WORK/expected"
    [ "$(comm -23 "$WORK/read" "$WORK/expected" | tee /dev/stderr | wc -l)" = 0 ]
    fr status "$(jq -r .id "$WORK/mount.json")" --json >"$WORK/status.json"
    holds '.verify_failures > 0' "$WORK/status.json"
    grep -i chunk "$FR_DIR/run/daemon.log"
    if fr verify "$first/small:packed" --deep >"$WORK/verify" 2>&1; then return 1; fi
    cat "$WORK/verify"
    grep -i chunk "$WORK/verify"
    # Good bytes again: the same device serves them.
    flip_byte "$file" $((size / 2))
    drop_caches
    tree_facts "$WORK/mnt" >"$WORK/facts"
    fr umount "$WORK/mnt"
    same "$WORK/facts"
}
check "a flipped byte in the registry: an I/O error, never data, and service when it is mended" flipped

echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
