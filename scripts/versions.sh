# shellcheck shell=bash disable=SC2154 # scripts/lib.sh is read before.
# Two versions of the images of scripts/image, for scripts/sharing and scripts/bench start: `lay` makes their trees.

# Debian packages of each pair whose security update is installed in the newer version only.
packages_of() {
    case $1 in
    redis) echo libssl3 ;;
    redis-runtime) echo redis-server redis-tools libssl3 ;;
    node-runtime) echo nodejs libnode108 libssl3 ;;
    demo-runtime) echo libssl3 libpython3.11-minimal libpython3.11-stdlib python3.11-minimal ;;
    esac
}
# version PACKAGE older|newer: the version in the main archive, or the newest one.
version() {
    local all
    all=$(apt-cache madison "$1" | awk '{print $3, $6}')
    case $2 in
    older) awk '$2 == "bookworm/main" {print $1; exit}' <<<"$all" ;;
    newer) awk 'NR == 1 {print $1}' <<<"$all" ;;
    esac
}

# lay PAIR older|newer TREE: a tree with the packages of that age, over the image's; sets $MADE.
lay() {
    local dir=$WORK/$1-$2 package python=()
    mkdir -p "$dir/upper" "$dir/work" "$dir/tree" "$dir/debs"
    mount -t overlay overlay -o "lowerdir=$3,upperdir=$dir/upper,workdir=$dir/work" "$dir/tree"
    defer umount -l "$dir/tree"
    # apt would fetch as a user of its own, who can't write here.
    for package in $(packages_of "$1"); do
        (cd "$dir/debs" && apt-get -qq -o DPkg::Lock::Timeout=300 -o APT::Sandbox::User=root download "$package=$(version "$package" "$2")" >&2)
        dpkg-deb --fsys-tarfile "$dir/debs/$package"_*.deb | tar -x --keep-directory-symlink --numeric-owner -C "$dir/tree"
    done
    local packages=/usr/local/lib/python3.11/dist-packages
    case $1-$2 in
    demo-older) pip_older "$dir/tree$packages" fastapi==0.115.11 starlette==0.46.1 uvicorn==0.34.1 pydantic==2.11.4; python=("$packages") ;;
    demo-runtime-older)
        pip_older "$dir/tree$packages" numpy==2.2.5 pandas==2.2.2 fastapi==0.115.11 starlette==0.46.1 uvicorn==0.34.1
        python=(/usr/lib/python3 /usr/lib/python3.11 "$packages")
        ;;
    demo-runtime-newer) python=(/usr/lib/python3 /usr/lib/python3.11) ;;
    node-older) for package in express fastify mongoose winston; do npm_older "$dir/tree/app/node_modules" "$package"; done ;;
    esac
    settle "$dir"
    if [ ${#python[@]} != 0 ]; then
        # As scripts/image does it, by the tree's own python: byte code that says its source's time, which is as old as the
        # image's now. Stale byte code would be read and thrown away by each start, and each source compiled.
        chroot "$dir/tree" /usr/bin/env -i PATH=/usr/bin:/bin LC_ALL=C PYTHONHASHSEED=0 \
            python3 -m compileall -qq -f --invalidation-mode timestamp "${python[@]}" >&2 || true
        settle "$dir"
    fi
    MADE=$dir/tree
}

# settle DIR: nothing that was laid there is newer than the image's own files.
settle() {
    local epoch
    epoch=$(sed -n 's/^export SOURCE_DATE_EPOCH=\([0-9]*\).*/\1/p' "$REPO/scripts/image")
    (cd "$1/upper" && find . -newermt "@${epoch:?}" -not -type c -print0) | (cd "$1/tree" && xargs -0r touch -h -d "@$epoch")
}

# pip_older SITE PACKAGE==VERSION…: the Python packages one release before those of scripts/image.
pip_older() {
    local site=$1 package
    shift
    for package in "${@%%==*}"; do rm -rf "${site:?}/$package"{,.libs,-*.dist-info}; done
    python3 -m pip install --quiet --no-compile --no-deps --disable-pip-version-check --root-user-action ignore --python-version 3.11 \
        --platform manylinux2014_x86_64 --platform manylinux_2_17_x86_64 --only-binary=:all: --upgrade --target "$site" "$@" >&2
}

# npm_older MODULES PACKAGE: the release of a package before the one that is there.
npm_older() {
    local dir=$1/$2 has url
    has=$(jq -r .version "$dir/package.json")
    url=$(curl -sSf "https://registry.npmjs.org/$2" |
        jq -r --arg has "$has" '[.versions[] | select(.version | test("-") | not)] as $all | [$all[].version] | index($has) as $at | $all[$at - 1].dist.tarball')
    # Packages of its own stay.
    find "$dir" -mindepth 1 -maxdepth 1 -not -name node_modules -exec rm -rf {} +
    curl -sSf "$url" | tar -xz --strip-components 1 --no-same-owner -C "$dir"
}
