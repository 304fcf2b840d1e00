# shellcheck shell=bash
# Test suites of others for a file system that can be written: fsx (random operations, each read verified), pjdfstest (POSIX, name
# by name) and stress-ng's file system stressors with verification. Source it; $TOOLS is where scripts/setup put the first two.

# suites DIR RESULTS SECONDS: all of them in DIR. RESULTS gets the names of what failed, a line each: compare it with that of
# another device. Errors that no file system may have (a wrong byte, a wrong size) make it return 1.
suites() {
    local dir=$1 results=$2 seconds=$3 work seed=$RANDOM
    work=$(mktemp -d)
    chmod 777 "$dir"
    : >"$results"
    cat >"$work/fsx.toml" <<'TOML'
flen = 4194304
[opsize]
max = 131072
[weights]
close_open = 1
invalidate = 2
truncate = 3
fsync = 1
fdatasync = 1
posix_fallocate = 2
punch_hole = 4
sendfile = 3
posix_fadvise = 8
copy_file_range = 3
TOML
    echo "fsx with the seed $seed"
    if ! "$TOOLS/fsx" -q -f "$work/fsx.toml" -S "$seed" -N $((seconds * 1000)) -P "$work" "$dir/fsx" >"$work/fsx" 2>&1; then
        tail -n 30 "$work/fsx"
        return 1
    fi
    cat >"$work/pjdfstest.toml" <<'TOML'
[features]
posix_fallocate = {}
rename_ctime = {}
utime_now = {}
utimensat = {}
stat_st_birthtime = {}
[settings]
naptime = 0.02
allow_remount = false
[dummy_auth]
entries = [["nobody", "nogroup"], ["daemon", "daemon"]]
TOML
    mkdir "$dir/pjdfstest"
    chmod 777 "$dir/pjdfstest"
    "$TOOLS/pjdfstest" -c "$work/pjdfstest.toml" -p "$dir/pjdfstest" >"$work/pjdfstest" 2>&1 || true
    grep -q '^Summary: ' "$work/pjdfstest" || { tail -n 30 "$work/pjdfstest"; return 1; }
    awk '$2 == "FAILED" {print "pjdfstest " $1}' "$work/pjdfstest" | sort >>"$results"
    grep '^Summary: ' "$work/pjdfstest" | sed 's/^Summary/pjdfstest/'
    mkdir "$dir/stress"
    local stressor
    for stressor in dentry dir rename link symlink hdd fallocate fpunch seek copy-file file-ioctl chmod utime; do
        stress-ng --quiet --temp-path "$dir/stress" --timeout "$((seconds / 5 + 1))" --verify --hdd-bytes 16m --fallocate-bytes 32m \
            --"$stressor" 2 >"$work/stress" 2>&1 || { echo "stress-ng $stressor" >>"$results"; cat "$work/stress"; }
    done
    rm -rf "$work" "$dir/stress" "$dir/pjdfstest"
}

# suite_of_device DEVICE SECONDS: fsx on the block device itself; what is on it is lost.
suite_of_device() {
    local device=$1 seconds=$2 work seed=$RANDOM
    work=$(mktemp -d)
    cat >"$work/fsx.toml" <<'TOML'
flen = 33554432
nosizechecks = true
blockmode = true
[opsize]
max = 262144
align = 512
[weights]
close_open = 0
truncate = 0
invalidate = 2
fsync = 2
fdatasync = 1
punch_hole = 5
posix_fadvise = 10
TOML
    echo "fsx on $device with the seed $seed"
    "$TOOLS/fsx" -q -f "$work/fsx.toml" -S "$seed" -N $((seconds * 1000)) -P "$work" "$device" >"$work/fsx" 2>&1 ||
        { tail -n 30 "$work/fsx"; return 1; }
    rm -rf "$work"
}

# has_journal DEVICE JOURNAL: whether its file system is as --journal says of one that is kept: auto or none.
has_journal() {
    local found=none
    ! dumpe2fs -h "$1" 2>/dev/null | grep -q '^Filesystem features:.* has_journal' || found=auto
    [ "$found" = "$2" ] || { echo "$1: a journal was wanted: $2, found: $found"; return 1; }
}

# no_more PLAIN OURS: whether nothing fails on ours but what fails on the plain one.
no_more() {
    local more
    more=$(comm -13 "$1" "$2")
    [ -z "$more" ] || { echo "these fail on our device alone:"; echo "$more"; return 1; }
}
