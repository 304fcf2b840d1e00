//! containerd: does it run, does it know the snapshotter, and what is to be added to its configuration?

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::Check;
use crate::snapshot::api::Api;
use crate::snapshot::damaged;
use crate::snapshot::wire::Empty;
use crate::snapshot::wire::introspection::{self, PluginsRequest, PluginsResponse};
use crate::snapshot::wire::version::{self, VersionResponse};

/// Longest wait for containerd.
const PATIENCE: Duration = Duration::from_secs(5);

/// Where things are on this node.
#[derive(Debug)]
pub struct Node {
    /// containerd's socket.
    pub containerd: PathBuf,
    /// Its configuration.
    pub config: PathBuf,
    /// What it calls the snapshotter.
    pub name: String,
    /// The snapshotter's socket.
    pub socket: PathBuf,
}

impl Node {
    /// All checks around containerd, the snapshotters' state below `root` included.
    pub async fn checks(&self, root: &Path) -> Vec<Check> {
        let mut checks = vec![self.snapshotter()];
        match self.version().await {
            Ok(version) => {
                checks.push(Check::good("containerd", version));
                checks.push(self.plugin().await);
                checks.push(self.cri());
                checks.extend(self.namespace());
            }
            Err(reason) => {
                checks.push(Check::missing("containerd", reason, "systemctl start containerd"));
            }
        }
        checks.extend(damaged(root).into_iter().map(|(dir, reason)| {
            let mend = "firstread pull --repair REF (of its image)";
            Check::bad("snapshots", format!("the record in {} is damaged: {reason}", dir.display()), mend)
        }));
        checks
    }

    async fn ask<Q, A>(&self, service: &str, method: &str, question: Q) -> Result<A, String>
    where
        Q: prost::Message + 'static,
        A: prost::Message + Default + 'static,
    {
        let at = self.containerd.display();
        let api = Api::new(&self.containerd).map_err(|status| status.message().to_owned())?;
        match tokio::time::timeout(PATIENCE, api.call(service, method, question)).await {
            Ok(answer) => answer.map_err(|status| format!("{at}: {}", status.message())),
            Err(_) => Err(format!("{at}: no answer within {} s", PATIENCE.as_secs())),
        }
    }

    async fn version(&self) -> Result<String, String> {
        self.ask(version::SERVICE, "Version", Empty {}).await.map(|answer: VersionResponse| answer.version)
    }

    fn snapshotter(&self) -> Check {
        let at = self.socket.display();
        match UnixStream::connect(&self.socket) {
            Ok(_) => Check::good("snapshotter", format!("listens at {at}")),
            Err(error) => {
                Check::missing("snapshotter", format!("{at}: {error}"), "systemctl start firstread-snapshotter")
            }
        }
    }

    async fn plugin(&self) -> Check {
        let filters = vec![format!("type==io.containerd.snapshotter.v1,id==\"{}\"", self.name)];
        let name = "proxy plugin";
        let mend = format!("firstread doctor --containerd >> {}; systemctl restart containerd", self.config.display());
        match self.ask(introspection::SERVICE, "Plugins", PluginsRequest { filters }).await {
            Ok(PluginsResponse { plugins }) if plugins.is_empty() => {
                Check::missing(name, format!("containerd has no snapshotter {:?}", self.name), mend)
            }
            Ok(_) => Check::good(name, format!("containerd has the snapshotter {:?}", self.name)),
            Err(reason) => Check::bad(name, reason, mend),
        }
    }

    /// Whether pods get the snapshotter.
    fn cri(&self) -> Check {
        let at = self.config.display();
        let value: toml::Value = match std::fs::read_to_string(&self.config).map(|text| toml::from_str(&text)) {
            Ok(Ok(value)) => value,
            Ok(Err(error)) => return Check::bad("CRI", format!("{at}: {error}"), format!("$EDITOR {at}")),
            Err(error) => {
                return Check::missing("CRI", format!("{at}: {error}"), "name the file with --containerd-config");
            }
        };
        let plugin = |name: &str| value.get("plugins")?.get(name);
        let old = plugin("io.containerd.grpc.v1.cri").and_then(|cri| cri.get("containerd")?.get("snapshotter"));
        let new = plugin("io.containerd.cri.v1.images").and_then(|images| images.get("snapshotter"));
        match old.or(new).and_then(toml::Value::as_str) {
            Some(found) if found == self.name => Check::good("CRI", format!("pods use the snapshotter {found:?}")),
            found => Check::missing(
                "CRI",
                format!("pods use the snapshotter {:?}", found.unwrap_or("overlayfs")),
                format!("firstread doctor --containerd >> {at}; systemctl restart containerd"),
            ),
        }
    }

    /// What is mounted by the snapshotter must be seen by containerd.
    fn namespace(&self) -> Option<Check> {
        let of = |socket: &Path| {
            let stream = UnixStream::connect(socket).ok()?;
            let peer = rustix::net::sockopt::socket_peercred(&stream).ok()?;
            std::fs::read_link(format!("/proc/{}/ns/mnt", peer.pid.as_raw_nonzero())).ok()
        };
        let (theirs, ours) = (of(&self.containerd)?, of(&self.socket)?);
        Some(match theirs == ours {
            true => Check::good("mount namespace", "containerd and the snapshotter share it"),
            false => Check::bad(
                "mount namespace",
                "containerd does not see what the snapshotter mounts",
                "take PrivateMounts=, ProtectSystem= and the like out of the units",
            ),
        })
    }

    /// The lines to add to containerd's configuration, for the version that runs.
    pub async fn lines(&self) -> String {
        let version = self.version().await.unwrap_or_default();
        let is_one = version.trim_start_matches('v').starts_with("1.");
        lines(&self.name, &self.socket, if is_one { Major::One } else { Major::Two })
    }
}

#[derive(Clone, Copy)]
enum Major {
    One,
    Two,
}

fn lines(name: &str, socket: &Path, major: Major) -> String {
    let socket = socket.display();
    let plugin = format!("[proxy_plugins.{name}]\n  type = \"snapshot\"\n  address = \"{socket}\"\n");
    match major {
        Major::One => format!(
            "version = 2\n{plugin}\n[plugins.\"io.containerd.grpc.v1.cri\".containerd]\n  snapshotter = \"{name}\"\n  \
             # tells the snapshotter where images come from; it works without, and asks containerd then\n  \
             disable_snapshot_annotations = false\n"
        ),
        Major::Two => format!(
            "version = 3\n{plugin}  [proxy_plugins.{name}.exports]\n    enable_remote_snapshot_annotations = \"true\"\n\n\
             [plugins.\"io.containerd.cri.v1.images\"]\n  snapshotter = \"{name}\"\n  \
             disable_snapshot_annotations = false\n\n\
             # for ctr, which unpacks by the transfer service\n\
             [[plugins.\"io.containerd.transfer.v1.local\".unpack_config]]\n  platform = \"linux\"\n  \
             snapshotter = \"{name}\"\n"
        ),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn the_lines_are_a_configuration_that_the_check_accepts() {
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join("config.toml");
        for major in [Major::One, Major::Two] {
            let text = lines("lazy", Path::new("/run/x.sock"), major);
            let value: toml::Value = toml::from_str(&text).unwrap();
            assert_eq!(value["proxy_plugins"]["lazy"]["address"].as_str(), Some("/run/x.sock"));
            std::fs::write(&config, &text).unwrap();
            let node = |name: &str| Node {
                containerd: PathBuf::new(),
                config: config.clone(),
                name: name.to_owned(),
                socket: PathBuf::new(),
            };
            assert_eq!(node("lazy").cri().health, crate::cli::doctor::Health::Good);
            assert_eq!(node("other").cri().health, crate::cli::doctor::Health::Missing);
        }
    }
}
