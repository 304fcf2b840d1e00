#!/bin/bash
# vm: --time 120
# The kernel's own dm-verity over a lazily loaded device: the image mounts and reads as it was packed; one byte changed on
# the way is an I/O error of exactly that block.
. "$REPO/tests/vm/guest/lib.sh"
use_image --verity
root=$(fr inspect --json "$IMAGE" | json .verity.root)
offset=$(fr inspect --json "$IMAGE" | json .verity.offset)

for transport in ublk nbd loop; do
    attached=$(fr attach --json --transport "$transport" "$IMAGE")
    device=$(json .device <<<"$attached")
    veritysetup open "$device" checked "$device" "$root" --hash-offset="$offset"
    mount -o ro,noload /dev/mapper/checked "$WORK/mnt"
    check_tree "$WORK/mnt"
    # Whoever serves must not have it mounted itself.
    until_true 10 free_of_mounts || die "the daemon has a device of its own mounted: $(cat "/proc/$(daemon_pid)/mountinfo")"
    ! fr detach "$device" 2>"$WORK/refusal" || die "detached below dm-verity"
    umount "$WORK/mnt"
    veritysetup close checked
    fr detach "$(json .id <<<"$attached")"
    echo "$transport: dm-verity opens, every file has its sum"
done

# The same bytes but one, as a disk of their own: the check is the kernel's, whoever serves.
device=$(fr attach --transport ublk "$IMAGE")
dd if="$device" of="$WORK/disk" bs=1M status=none
fr detach "$device" >/dev/null
# In the largest file's data: found by its content.
at=$(grep -abo "$(head -c 16 "$WORK/tree/size-20000000" | od -An -tx1 | tr -d ' \n' | sed 's/../\\x&/g')" -P "$WORK/disk" | head -n 1 | cut -d: -f1)
at=$((at + 9000000))
was=$(od -An -tu1 -j "$at" -N 1 "$WORK/disk" | tr -d ' ')
# shellcheck disable=SC2059
printf "\\x$(printf %02x $((was ^ 1)))" | dd of="$WORK/disk" bs=1 seek="$at" conv=notrunc status=none
fr build --quiet "raw:$WORK/disk" "oci:$WORK/changed:t" >/dev/null
device=$(fr attach --transport ublk "oci:$WORK/changed:t")
veritysetup open "$device" changed "$device" "$root" --hash-offset="$offset"
block=$((at / 4096))
! dd if=/dev/mapper/changed bs=4096 skip=$block count=1 iflag=direct status=none of=/dev/null 2>"$WORK/error" || die "a changed byte passed"
grep -qi 'input/output error' "$WORK/error" || die "$(cat "$WORK/error")"
dd if=/dev/mapper/changed bs=4096 skip=$((block + 1)) count=1 iflag=direct status=none of=/dev/null || die "the block beside it"
dd if=/dev/mapper/changed bs=4096 skip=$((block - 1)) count=1 iflag=direct status=none of=/dev/null || die "the block beside it"
veritysetup close changed
fr stop >/dev/null
echo "one changed byte is EIO of its block alone"
