//! The gRPC side of the snapshotter: containerd's snapshots service on a unix socket.

use std::convert::Infallible;
use std::future::Future;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use prost::Message;
use tokio::net::UnixListener;
use tonic::body::Body;
use tonic::codegen::http;
use tonic::codegen::tokio_stream::wrappers::UnixListenerStream;
use tonic::codegen::{Service, tokio_stream};
use tonic::server::Grpc;
use tonic::transport::Server;
use tonic::{Request, Response, Status};
use tonic_prost::ProstCodec;

use super::failure::Failure;
use super::service::Snapshotter;
use super::wire::Empty;
use super::wire::snapshots::SERVICE;
use crate::error::{Error, Result};

/// Largest request in bytes; containerd's labels are at most 4 KiB each.
const REQUEST_MAX: usize = 4 << 20;

type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// Binds the socket at `path`, in place of one that an earlier process left. Only its owner may connect.
///
/// # Errors
/// What the system says; [`Error::Busy`] when somebody listens there.
pub fn bind(path: &Path) -> Result<UnixListener> {
    let failed = |error| Error::io(format!("listening at {}", path.display()), error);
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(failed)?;
    }
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        return Err(Error::Busy(format!("another process listens at {}", path.display())));
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
    Ok(listener)
}

/// Serves until `end` is ready; calls that were begun are finished.
///
/// # Errors
/// What ends the listening.
pub async fn serve(snapshotter: Arc<Snapshotter>, listener: UnixListener, end: impl Future<Output = ()>) -> Result<()> {
    let incoming = UnixListenerStream::new(listener);
    let served = Server::builder().serve_with_incoming_shutdown(Served(snapshotter), incoming, end).await;
    served.map_err(|error| Error::io("serving containerd", std::io::Error::other(error)))
}

/// What answers a connection's requests.
#[derive(Clone)]
struct Served(Arc<Snapshotter>);

impl Service<http::Request<Body>> for Served {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let snapshotter = Arc::clone(&self.0);
        Box::pin(async move { Ok(route(snapshotter, request).await) })
    }
}

async fn route(at: Arc<Snapshotter>, request: http::Request<Body>) -> http::Response<Body> {
    let path = request.uri().path().to_owned();
    match path.strip_prefix('/').and_then(|path| path.strip_prefix(SERVICE)?.strip_prefix('/')) {
        Some("Prepare") => unary(request, |q| async move { at.prepare(q).await }).await,
        Some("View") => unary(request, |q| async move { at.view(q).await }).await,
        Some("Mounts") => unary(request, |q| async move { at.mounts(q).await }).await,
        Some("Commit") => unary(request, |q| async move { at.commit(q).await.map(|()| Empty {}) }).await,
        Some("Remove") => unary(request, |q| async move { at.remove(q).await.map(|()| Empty {}) }).await,
        Some("Stat") => unary(request, |q| async move { at.stat(&q) }).await,
        Some("Update") => unary(request, |q| async move { at.update(q).await }).await,
        Some("Usage") => unary(request, |q| async move { at.usage(q).await }).await,
        Some("Cleanup") => unary(request, |q| async move { at.cleanup(q).await.map(|()| Empty {}) }).await,
        Some("List") => {
            let handler = Handler(|request: Request<_>| async move {
                let pages = at.list(&request.into_inner())?;
                Ok(Response::new(tokio_stream::iter(pages.into_iter().map(Ok))))
            });
            let codec = ProstCodec::default();
            Grpc::new(codec).max_decoding_message_size(REQUEST_MAX).server_streaming(handler, request).await
        }
        _ => Status::unimplemented(format!("{path} is no method of the snapshots service")).into_http(),
    }
}

async fn unary<Q, A, F>(
    request: http::Request<Body>,
    work: impl FnOnce(Q) -> F + Clone + Send + 'static,
) -> http::Response<Body>
where
    Q: Message + Default + std::fmt::Debug + 'static,
    A: Message + 'static,
    F: Future<Output = Result<A, Failure>> + Send + 'static,
{
    let handler = Handler(move |request: Request<Q>| async move {
        let request = request.into_inner();
        tracing::debug!(?request);
        match work(request).await {
            Ok(answer) => Ok(Response::new(answer)),
            Err(failure) => {
                // "Exists" and "not found" are answers that containerd asks for.
                match &failure {
                    Failure::Exists(_) | Failure::NotFound(_) => tracing::debug!(%failure),
                    failure => tracing::warn!(%failure),
                }
                Err(failure.into())
            }
        }
    });
    Grpc::new(ProstCodec::<A, Q>::default()).max_decoding_message_size(REQUEST_MAX).unary(handler, request).await
}

/// A function as tonic's servers want their methods.
struct Handler<F>(F);

impl<F, Q, A, R> Service<Request<Q>> for Handler<F>
where
    F: FnOnce(Request<Q>) -> R + Clone,
    R: Future<Output = std::result::Result<Response<A>, Status>> + Send + 'static,
{
    type Response = Response<A>;
    type Error = Status;
    type Future = BoxFuture<std::result::Result<Response<A>, Status>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<std::result::Result<(), Status>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Q>) -> Self::Future {
        Box::pin((self.0.clone())(request))
    }
}
