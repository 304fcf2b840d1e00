//! A kubelet's half of CRI (runtime.v1), as far as a pod with containers needs it. Field numbers are those of Kubernetes'
//! cri-api, api.proto.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::HashMap;
use std::path::Path;

use firstread::snapshot::api::Api;
use prost::Message;
use tokio::runtime::Runtime;
use tonic::Status;

const RUNTIME: &str = "runtime.v1.RuntimeService";
const IMAGES: &str = "runtime.v1.ImageService";
/// NamespaceMode NODE.
const NODE: i32 = 2;

#[derive(Clone, PartialEq, Message)]
struct ImageSpec {
    #[prost(string, tag = "1")]
    image: String,
    #[prost(map = "string, string", tag = "2")]
    annotations: HashMap<String, String>,
}

#[derive(Clone, PartialEq, Message)]
struct PullImage {
    #[prost(message, optional, tag = "1")]
    image: Option<ImageSpec>,
}

#[derive(Clone, PartialEq, Message)]
struct Answer {
    #[prost(string, tag = "1")]
    id: String,
}

#[derive(Clone, PartialEq, Message)]
struct PodMetadata {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    uid: String,
    #[prost(string, tag = "3")]
    namespace: String,
}

#[derive(Clone, PartialEq, Message)]
struct Namespaces {
    #[prost(int32, tag = "1")]
    network: i32,
    #[prost(int32, tag = "2")]
    pid: i32,
    #[prost(int32, tag = "3")]
    ipc: i32,
}

#[derive(Clone, PartialEq, Message)]
struct PodSecurity {
    #[prost(message, optional, tag = "1")]
    namespaces: Option<Namespaces>,
}

#[derive(Clone, PartialEq, Message)]
struct LinuxPod {
    #[prost(message, optional, tag = "2")]
    security: Option<PodSecurity>,
}

#[derive(Clone, PartialEq, Message)]
struct PodConfig {
    #[prost(message, optional, tag = "1")]
    metadata: Option<PodMetadata>,
    #[prost(string, tag = "3")]
    log_directory: String,
    #[prost(map = "string, string", tag = "7")]
    annotations: HashMap<String, String>,
    #[prost(message, optional, tag = "8")]
    linux: Option<LinuxPod>,
}

#[derive(Clone, PartialEq, Message)]
struct RunPod {
    #[prost(message, optional, tag = "1")]
    config: Option<PodConfig>,
}

#[derive(Clone, PartialEq, Message)]
struct ContainerMetadata {
    #[prost(string, tag = "1")]
    name: String,
}

#[derive(Clone, PartialEq, Message)]
struct ContainerSecurity {
    #[prost(message, optional, tag = "3")]
    namespaces: Option<Namespaces>,
}

#[derive(Clone, PartialEq, Message)]
struct LinuxContainer {
    #[prost(message, optional, tag = "2")]
    security: Option<ContainerSecurity>,
}

#[derive(Clone, PartialEq, Message)]
struct ContainerConfig {
    #[prost(message, optional, tag = "1")]
    metadata: Option<ContainerMetadata>,
    #[prost(message, optional, tag = "2")]
    image: Option<ImageSpec>,
    #[prost(string, repeated, tag = "3")]
    command: Vec<String>,
    #[prost(string, tag = "11")]
    log_path: String,
    #[prost(message, optional, tag = "15")]
    linux: Option<LinuxContainer>,
}

#[derive(Clone, PartialEq, Message)]
struct CreateContainer {
    #[prost(string, tag = "1")]
    pod: String,
    #[prost(message, optional, tag = "2")]
    config: Option<ContainerConfig>,
    #[prost(message, optional, tag = "3")]
    pod_config: Option<PodConfig>,
}

#[derive(Clone, PartialEq, Message)]
struct OfId {
    #[prost(string, tag = "1")]
    id: String,
}

#[derive(Clone, PartialEq, Message)]
struct Nothing {}

/// A connection to containerd's CRI.
pub struct Kubelet {
    runtime: Runtime,
    api: Api,
}

/// A pod that runs.
pub struct Pod {
    pub id: String,
    config: PodConfig,
}

impl Kubelet {
    pub fn new(socket: &Path) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let api = runtime.block_on(async { Api::new(socket) }).unwrap();
        Self { runtime, api }
    }

    fn call<A: Message + Default + 'static>(
        &self,
        service: &str,
        method: &str,
        request: impl Message + 'static,
    ) -> Result<A, Status> {
        self.runtime.block_on(self.api.call(service, method, request))
    }

    pub fn pull(&self, image: &str) -> Result<String, Status> {
        let image = Some(ImageSpec { image: image.to_owned(), ..ImageSpec::default() });
        self.call(IMAGES, "PullImage", PullImage { image }).map(|answer: Answer| answer.id)
    }

    pub fn remove_image(&self, image: &str) {
        let image = Some(ImageSpec { image: image.to_owned(), ..ImageSpec::default() });
        let _: Nothing = self.call(IMAGES, "RemoveImage", PullImage { image }).unwrap();
    }

    /// A pod on the node's network, whose containers log below `logs`.
    pub fn run_pod(&self, name: &str, logs: &Path) -> Result<Pod, Status> {
        let namespaces = Some(Namespaces { network: NODE, pid: 1, ipc: 0 });
        let config = PodConfig {
            metadata: Some(PodMetadata {
                name: name.to_owned(),
                uid: name.to_owned(),
                namespace: "default".to_owned(),
            }),
            log_directory: logs.display().to_string(),
            annotations: HashMap::new(),
            linux: Some(LinuxPod { security: Some(PodSecurity { namespaces }) }),
        };
        let answer: Answer = self.call(RUNTIME, "RunPodSandbox", RunPod { config: Some(config.clone()) })?;
        Ok(Pod { id: answer.id, config })
    }

    /// A container of the pod, started; its log is `NAME.log`.
    pub fn start(&self, pod: &Pod, name: &str, image: &str, command: &[&str]) -> Result<String, Status> {
        let namespaces = Some(Namespaces { network: NODE, pid: 1, ipc: 0 });
        let config = ContainerConfig {
            metadata: Some(ContainerMetadata { name: name.to_owned() }),
            image: Some(ImageSpec { image: image.to_owned(), ..ImageSpec::default() }),
            command: command.iter().map(|&word| word.to_owned()).collect(),
            log_path: format!("{name}.log"),
            linux: Some(LinuxContainer { security: Some(ContainerSecurity { namespaces }) }),
        };
        let create =
            CreateContainer { pod: pod.id.clone(), config: Some(config), pod_config: Some(pod.config.clone()) };
        let id = self.call::<Answer>(RUNTIME, "CreateContainer", create)?.id;
        let _: Nothing = self.call(RUNTIME, "StartContainer", OfId { id: id.clone() })?;
        Ok(id)
    }

    /// Ends the pod and its containers, and removes them.
    pub fn remove_pod(&self, pod: &Pod) {
        let _: Nothing = self.call(RUNTIME, "StopPodSandbox", OfId { id: pod.id.clone() }).unwrap();
        let _: Nothing = self.call(RUNTIME, "RemovePodSandbox", OfId { id: pod.id.clone() }).unwrap();
    }
}
