//! The two plain HTTP ports: `/metrics`, and `/readyz` with `/livez`. Nothing secret and nothing to change is here.

use std::{convert::Infallible, io, net::SocketAddr, sync::Arc, time::Duration};

use http_body_util::Full;
use hyper::{Request, Response, StatusCode, body::Bytes, body::Incoming, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;

/// What a path answers: status, content type, body.
pub type Answer = (StatusCode, &'static str, String);

/// A client that has not sent its request head by then is dropped.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);

/// Opens the port, with an error that says which.
pub async fn bind(address: SocketAddr, what: &str) -> io::Result<TcpListener> {
    let cannot = |error: io::Error| {
        io::Error::new(error.kind(), format!("cannot listen on {address} for {what}: {error}"))
    };
    let listener = TcpListener::bind(address).await.map_err(cannot)?;
    tracing::info!("listening on {} for {what}", listener.local_addr()?);
    Ok(listener)
}

/// Serves GETs until dropped. `answer` is given the path.
pub async fn serve(listener: TcpListener, answer: impl Fn(&str) -> Option<Answer> + Send + Sync + 'static) {
    let answer = Arc::new(answer);
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!("accepting an HTTP connection: {error}");
                // Out of file descriptors, most likely: trying at once would only fill the log.
                tokio::time::sleep(Duration::from_millis(200)).await;
                continue;
            }
        };
        let answer = answer.clone();
        let service = service_fn(move |request: Request<Incoming>| {
            let response = respond(answer(request.uri().path()));
            async move { Ok::<_, Infallible>(response) }
        });
        tokio::spawn(async move {
            let mut builder = hyper::server::conn::http1::Builder::new();
            builder.timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT);
            if let Err(error) = builder.serve_connection(TokioIo::new(stream), service).await {
                tracing::debug!("HTTP connection: {error}");
            }
        });
    }
}

fn respond(answer: Option<Answer>) -> Response<Full<Bytes>> {
    let (status, content_type, body) =
        answer.unwrap_or((StatusCode::NOT_FOUND, TEXT, "not found\n".to_owned()));
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    let content_type = hyper::header::HeaderValue::from_static(content_type);
    response.headers_mut().insert(hyper::header::CONTENT_TYPE, content_type);
    response
}

pub const TEXT: &str = "text/plain; charset=utf-8";
pub const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
