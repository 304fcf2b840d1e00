# shellcheck shell=bash
# What the containerds of the scripts are told: containerd.toml with a snapshotter.

# containerd_config DIR SNAPSHOTTER: the configuration of one that has all its state in DIR and listens at DIR/sock, with a
# snapshotter `firstread` at the socket SNAPSHOTTER, and without CRI.
containerd_config() {
    sed -e "s|@AT@|$1|g" -e 's|@MORE@|"io.containerd.grpc.v1.cri", |' "$REPO/tests/common/containerd.toml"
    printf '[proxy_plugins.firstread]\ntype = "snapshot"\naddress = "%s"\n' "$2"
}
