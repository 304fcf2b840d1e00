# shellcheck shell=bash
# QEMU machines with Debian's own kernel, for the scripts that boot one. Sourced after scripts/lib.sh and `begin`.

CACHE=${FIRSTREAD_CACHE:-/var/cache/firstread-test}

# debian_kernel: sets $KERNEL to a directory with vmlinuz, virtio_blk.ko and busybox. They come as packages; nothing is installed.
debian_kernel() {
    local meta=linux-image-6.12-cloud-amd64 package dir deb
    apt-cache show "$meta" >/dev/null 2>&1 || meta="linux-image-cloud-amd64"
    package=$(apt-cache depends "$meta" | sed -n 's/^ *Depends: \(linux-image-.*\)/\1/p' | head -n 1)
    [ -n "$package" ] || die "no kernel package is known: apt-get update"
    KERNEL=$CACHE/$package
    [ ! -e "$KERNEL/vmlinuz" ] || return 0
    dir=$(mktemp -d "$WORK/kernel-XXXXXX")
    chmod 777 "$dir"
    (cd "$dir" && apt-get -qq download "$package" busybox-static) >"$LOGS/apt.log" 2>&1 || die "apt-get download: $(tail -n 1 "$LOGS/apt.log")"
    for deb in "$dir"/*.deb; do dpkg -x "$deb" "$dir/root"; done
    mkdir "$dir/out"
    cp "$dir"/root/boot/vmlinuz-* "$dir/out/vmlinuz"
    cp "$dir/root/bin/busybox" "$dir/out/busybox"
    find "$dir/root/lib/modules" -name 'virtio_blk.ko.xz' -exec xz -dc {} \; >"$dir/out/virtio_blk.ko"
    [ -s "$dir/out/virtio_blk.ko" ] || find "$dir/root/lib/modules" -name 'virtio_blk.ko' -exec cp {} "$dir/out/virtio_blk.ko" \;
    [ -s "$dir/out/virtio_blk.ko" ] || die "$package has no virtio_blk"
    mkdir -p "$CACHE"
    rm -rf "$KERNEL"
    mv "$dir/out" "$KERNEL"
}

# pack_initramfs INIT-SCRIPT: $WORK/initramfs.cpio, with busybox, the driver and a first process.
pack_initramfs() {
    local dir=$WORK/initramfs
    rm -rf "$dir"
    mkdir -p "$dir/bin" "$dir/lower" "$dir/proc" "$dir/sys" "$dir/dev"
    cp "$KERNEL/busybox" "$dir/bin/busybox"
    cp "$KERNEL/virtio_blk.ko" "$dir/"
    install -m 755 "$1" "$dir/init"
    (cd "$dir" && find . | cpio --quiet -o -H newc) >"$WORK/initramfs.cpio"
}

# start_qemu LOG OPTION…: a machine with that initramfs; $qemu is its process, LOG its console.
start_qemu() {
    local log=$1
    shift
    setsid qemu-system-x86_64 -M q35 -accel tcg,thread=multi -cpu max -smp 2 -m 1024 -nographic -nodefaults -serial stdio -no-reboot "$@" \
        -kernel "$KERNEL/vmlinuz" -initrd "$WORK/initramfs.cpio" \
        -append "console=ttyS0 panic=-1 quiet no_timer_check mitigations=off nokaslr no5lvl tsc=reliable rdinit=/init" \
        </dev/null >"$log" 2>&1 &
    # shellcheck disable=SC2034 # for those who stop it
    qemu=$!
    defer stop_pid "$qemu"
}

# Waits until a machine's console has a line that begins so. Lines of the console end with CR LF.
console() { # SECONDS PATTERN LOG PID
    local end=$((SECONDS + $1))
    until grep -aqs "^$2" "$3"; do
        alive "$4" || { tail -n 15 "$3" >&2; die "the machine ended before '$2'"; }
        [ "$SECONDS" -lt "$end" ] || { tail -n 15 "$3" >&2; die "no '$2' within $1 s"; }
        sleep 0.1
    done
}
