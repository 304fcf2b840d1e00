#!/usr/bin/env bash
# Real layers: images of Debian, PyPI and npm packages, each a layer more than the one before it, as umoci finds the changes of a
# tree (whiteouts included). What is mounted must be what umoci and containerd's overlayfs unpack, node by node.
set -euo pipefail
BUILT=debug
# shellcheck source=../scripts/lib.sh
. "$(dirname "$(readlink -f "$0")")/../scripts/lib.sh"

need_root
need_tools umoci skopeo containerd ctr getfattr setcap dpkg-deb python3 npm jq
[ -x "$FIRSTREAD" ] || die "$FIRSTREAD is missing: cargo build"
begin layers

layout=$WORK/layout bundle=$WORK/bundle tree=$WORK/bundle/rootfs
start_containerd
use_node layers
mkdir "$WORK/mnt" "$WORK/debs"
chmod 755 "$WORK/debs"

deb() {
    local name
    for name in "$@"; do
        (cd "$WORK/debs" && { compgen -G "${name}_*.deb" || apt-get -qq -o APT::Sandbox::User=root download "$name"; }) >>"$LOGS/apt.log" 2>&1
        dpkg-deb -x "$WORK"/debs/"${name}"_*.deb "$tree"
    done
}
wheel() { python3 -m pip install --quiet --no-deps --no-compile --upgrade --root-user-action=ignore --target "$tree/opt/python" "$@" >>"$LOGS/pip.log" 2>&1; }

# What is installed is exactly what is named, with all that it needs; what is there and no longer needed goes.
npm_install() {
    mkdir -p "$tree/srv/web"
    npm install --prefix "$tree/srv/web" --cache "$WORK/npm" --no-audit --no-fund --ignore-scripts --loglevel=error "$@" >>"$LOGS/npm.log" 2>&1
}

# A directory that a layer changes without listing it has the time of unpacking in containerd.
without_directory_times() { sed -E 's/^(\S+ d \S+ \S+) .*/\1/' "$1"; }

images=0 failed=0
# image NAME CHANGE…: makes a change, adds it as a layer, and compares the image of all layers so far.
image() {
    local name=$1
    shift
    "$@"
    umoci repack --refresh-bundle --image "$layout:$name" "$bundle" >>"$LOGS/umoci.log" 2>&1
    rm -rf "$WORK/other"
    umoci unpack --image "$layout:$name" "$WORK/other" >>"$LOGS/umoci.log" 2>&1
    tree_facts "$WORK/other/rootfs" >"$WORK/by-umoci"

    skopeo copy --quiet "oci:$layout:$name" "oci-archive:$WORK/$name.tar:$name" >>"$LOGS/skopeo.log" 2>&1
    local refused=
    if "${CTR[@]}" image import --base-name test.example/layers "$WORK/$name.tar" >>"$LOGS/ctr.log" 2>&1; then
        mkdir "$WORK/ctr-$name"
        "${CTR[@]}" image mount "test.example/layers:$name" "$WORK/ctr-$name" >>"$LOGS/ctr.log" 2>&1
        tree_facts "$WORK/ctr-$name" >"$WORK/by-containerd"
        umount "$WORK/ctr-$name"
    else
        refused=yes
    fi
    rm "$WORK/$name.tar"

    fr build --quiet "oci:$layout:$name" "oci:$WORK/packed:$name" >>"$LOGS/build.log" 2>&1
    fr mount --quiet "oci:$WORK/packed:$name" "$WORK/mnt" >>"$LOGS/mount.log"
    tree_facts "$WORK/mnt" >"$WORK/by-firstread"
    fr umount "$WORK/mnt" >>"$LOGS/mount.log"

    images=$((images + 1))
    local result=ok
    diff <(without_directory_times "$WORK/by-umoci") <(without_directory_times "$WORK/by-firstread") >"$LOGS/$name-umoci.diff" || result=FAILED
    if [ "$refused" != "${REFUSED:-}" ]; then
        echo "containerd refuses $name: ${refused:-no}, expected: ${REFUSED:-no}"
        result=FAILED
    elif [ -z "$refused" ]; then
        diff <(without_directory_times "$WORK/by-containerd") <(without_directory_times "$WORK/by-firstread") >"$LOGS/$name-containerd.diff" || result=FAILED
    fi
    if [ "$result" != ok ]; then
        failed=$((failed + 1))
        head -n 20 "$LOGS/$name"-*.diff | cut -c1-300
    fi
    printf '%-8s%-12s%6s layers%8s nodes\n' "$result" "$name" "$(jq '.layers | length' < <(skopeo inspect --raw "oci:$layout:$name"))" \
        "$(grep -c '^\./' "$WORK/by-firstread")"
}

base() { deb base-files busybox-static tzdata; }
capabilities() {
    deb iputils-ping
    setcap cap_net_raw+ep "$tree/bin/ping"
    chmod u+s "$tree/bin/busybox"
}
upgrade() {
    wheel requests==2.31.0 idna==3.6
    mkdir -p "$tree/etc/app"
    echo 1 >"$tree/etc/app/version"
}
replace() {
    wheel requests==2.32.3 idna==3.10
    rm -r "$tree/etc/app"
}
remove() { rm -rf "$tree/usr/share/doc" "$tree/usr/share/zoneinfo/right" "$tree/opt/python/idna"; }
restore() {
    deb tzdata
    wheel idna==3.6
    echo 2 >"$tree/etc/app"
}
links() {
    cp -al "$tree/usr/share/zoneinfo" "$tree/usr/share/zoneinfo-hard"
    chown -R 3000000000:70000 "$tree/usr/share/zoneinfo-hard/Europe"
    rm -r "$tree/usr/share/zoneinfo/Europe"
}
kinds() {
    rm "$tree/etc/app"
    ln -s Asia "$tree/usr/share/zoneinfo/Europe"
    mkdir -p "$tree/etc/app/deep/er"
    mkfifo "$tree/etc/app/fifo"
    mknod "$tree/etc/app/null" c 1 3
    setfattr -n user.note -v text "$tree/etc/app/deep"
}
modules() { deb node-semver node-lru-cache node-yallist; }
web() { npm_install express@4.17.3 chalk@4.1.2; }
web_upgrade() { npm_install express@4.21.2 chalk@5.3.0; }
web_prune() { npm_install --omit=dev && (cd "$tree/srv/web" && npm uninstall --cache "$WORK/npm" --no-audit --no-fund --loglevel=error express >>"$LOGS/npm.log" 2>&1); }
rename() { mv "$tree/usr/share/nodejs" "$tree/usr/lib/nodejs"; }
everything() {
    ln -s ../lib/nodejs "$tree/usr/share/nodejs"
    rm -rf "$tree/opt" "$tree/etc/app"
    deb perl-base
    truncate -s 100M "$tree/var/sparse"
    printf '' >"$tree/usr/lib/$(printf 'odd-\377\376')"
}
# umoci marks what was in the directory below the file that takes its place. containerd refuses such layers.
directories_to_others() {
    rm -r "$tree/usr/share/zoneinfo/Asia" "$tree/usr/lib/nodejs"
    echo file >"$tree/usr/share/zoneinfo/Asia"
    ln -s ../share "$tree/usr/lib/nodejs"
}

{
    umoci init --layout "$layout"
    umoci new --image "$layout:base"
    umoci unpack --image "$layout:base" "$bundle"
} >>"$LOGS/umoci.log" 2>&1
for change in base capabilities upgrade replace remove restore links kinds modules web web_upgrade web_prune rename everything; do
    image "$change" "$change"
done
REFUSED=yes image directories directories_to_others
echo "$images images, $failed failed"
[ "$failed" = 0 ]
