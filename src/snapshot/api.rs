//! A client of containerd's gRPC interface, or of any like it: calls by name, on a unix socket.

use std::path::Path;
use std::str::FromStr;
use std::time::Duration;

use prost::Message;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::codegen::tokio_stream::Stream;
use tonic::metadata::AsciiMetadataValue;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status, Streaming};
use tonic_prost::ProstCodec;

/// Longest wait for a connection.
const CONNECT: Duration = Duration::from_secs(5);
/// Longest message that is read: containerd sends blobs in pieces of 1 MiB.
const MESSAGE_MAX: usize = 16 << 20;
/// The header that names the namespace.
const NAMESPACE: &str = "containerd-namespace";

/// A connection, which is made with the first call and again when it broke, and a namespace.
#[derive(Clone, Debug)]
pub struct Api {
    channel: Channel,
    namespace: Option<AsciiMetadataValue>,
    lease: Option<AsciiMetadataValue>,
}

impl Api {
    /// A client of the server at `socket`. Nothing is sent yet. To be called on a runtime.
    ///
    /// # Errors
    /// A path that can't be one of a socket.
    pub fn new(socket: &Path) -> Result<Self, Status> {
        let uri = format!("unix://{}", socket.display());
        let endpoint = Endpoint::from_shared(uri)
            .map_err(|error| Status::invalid_argument(format!("the socket {}: {error}", socket.display())))?;
        Ok(Self { channel: endpoint.connect_timeout(CONNECT).connect_lazy(), namespace: None, lease: None })
    }

    /// The same connection for another namespace.
    ///
    /// # Errors
    /// A name that is none.
    pub fn within(&self, namespace: &str) -> Result<Self, Status> {
        Ok(Self { namespace: Some(ascii(namespace)?), ..self.clone() })
    }

    /// The same connection under a lease: what is made is not collected as garbage while the lease is there.
    ///
    /// # Errors
    /// An id that is none.
    pub fn leased(&self, lease: &str) -> Result<Self, Status> {
        Ok(Self { lease: Some(ascii(lease)?), ..self.clone() })
    }

    /// Calls a method with one answer.
    ///
    /// # Errors
    /// The server's status, or [`tonic::Code::Unavailable`].
    pub async fn call<Q, A>(&self, service: &str, method: &str, request: Q) -> Result<A, Status>
    where
        Q: Message + 'static,
        A: Message + Default + 'static,
    {
        let mut grpc = self.ready().await?;
        let codec = ProstCodec::<Q, A>::default();
        Ok(grpc.unary(self.request(request), path(service, method)?, codec).await?.into_inner())
    }

    /// Calls a method with many answers.
    ///
    /// # Errors
    /// As of [`call`](Self::call).
    pub async fn stream<Q, A>(&self, service: &str, method: &str, request: Q) -> Result<Streaming<A>, Status>
    where
        Q: Message + 'static,
        A: Message + Default + 'static,
    {
        let mut grpc = self.ready().await?;
        let codec = ProstCodec::<Q, A>::default();
        Ok(grpc.server_streaming(self.request(request), path(service, method)?, codec).await?.into_inner())
    }

    /// Calls a method with many requests and many answers.
    ///
    /// # Errors
    /// As of [`call`](Self::call).
    pub async fn talk<Q, A>(
        &self,
        service: &str,
        method: &str,
        requests: impl Stream<Item = Q> + Send + 'static,
    ) -> Result<Streaming<A>, Status>
    where
        Q: Message + 'static,
        A: Message + Default + 'static,
    {
        let mut grpc = self.ready().await?;
        let codec = ProstCodec::<Q, A>::default();
        Ok(grpc.streaming(self.request(requests), path(service, method)?, codec).await?.into_inner())
    }

    async fn ready(&self) -> Result<Grpc<Channel>, Status> {
        let mut grpc = Grpc::new(self.channel.clone()).max_decoding_message_size(MESSAGE_MAX);
        grpc.ready().await.map_err(|error| Status::unavailable(chain(&error)))?;
        Ok(grpc)
    }

    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        if let Some(namespace) = &self.namespace {
            request.metadata_mut().insert(NAMESPACE, namespace.clone());
        }
        if let Some(lease) = &self.lease {
            request.metadata_mut().insert("containerd-lease", lease.clone());
        }
        request
    }
}

/// An error and its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    text
}

fn ascii(text: &str) -> Result<AsciiMetadataValue, Status> {
    AsciiMetadataValue::from_str(text).map_err(|_| Status::invalid_argument(format!("the name {text:?}")))
}

fn path(service: &str, method: &str) -> Result<PathAndQuery, Status> {
    let path = format!("/{service}/{method}");
    PathAndQuery::from_str(&path).map_err(|error| Status::internal(format!("{path}: {error}")))
}
