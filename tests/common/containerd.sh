# shellcheck shell=bash
# What the containerds of the tests and benchmarks are told, on the machine and in others.

# containerd_config DIR SNAPSHOTTER: the configuration of one that has all its state in DIR and listens at DIR/sock, with a
# snapshotter `firstread` at the socket SNAPSHOTTER.
containerd_config() {
    cat <<TOML
version = 2
root = "$1/root"
state = "$1/state"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.aufs", "io.containerd.tracing.processor.v1.otlp",
  "io.containerd.internal.v1.tracing"]
[grpc]
address = "$1/sock"
[ttrpc]
address = "$1/sock.ttrpc"
[proxy_plugins.firstread]
type = "snapshot"
address = "$2"
TOML
}
