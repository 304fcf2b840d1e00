#!/bin/bash
# The machine has what the other scenarios rely on, and what happens in it stays in it.
set -euo pipefail

missing=()
for node in ublk-control nbd0 loop-control fuse mapper/control; do [ -e "/dev/$node" ] || missing+=("/dev/$node"); done
for kind in ext4 erofs overlay fuseblk; do grep -qw "$kind" /proc/filesystems || missing+=("the file system $kind"); done
dmsetup targets | grep -q '^verity' || missing+=("dm-verity")
[ ${#missing[@]} = 0 ] || { echo "missing: ${missing[*]}"; exit 1; }

echo inside >/tmp/inside
echo out >"$VM_OUT/result"
! touch "$REPO/inside" 2>/dev/null || { echo "the outer machine's files can be written"; exit 1; }
extra=$(ip -br link show | awk '$1 != "lo"')
[ -z "$extra" ] || { echo "there is a network: $extra"; exit 1; }
echo "Linux $(uname -r), $(nproc) processor, $(awk '/MemTotal/ {printf "%d", $2 / 1024}' /proc/meminfo) MB"
