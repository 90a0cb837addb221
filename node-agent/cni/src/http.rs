//! The little HTTP that a plugin needs: one request on one connection, to the agent or to the API server. HTTP/1.0, so
//! that the answer ends with the connection and comes in one piece.

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream},
    os::unix::net::UnixStream,
    path::Path,
    sync::Arc,
    time::Duration,
};

use rustls::{
    ClientConfig, ClientConnection, RootCertStore, StreamOwned,
    pki_types::{CertificateDer, ServerName, pem::PemObject},
};
use socket2::{Domain, SockAddr, Socket, Type};

const CONNECT: Duration = Duration::from_secs(3);
/// More than a Pod ever has; etcd stores no larger object.
const MAX_ANSWER: u64 = 4 << 20;

/// An answer.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub body: Vec<u8>,
}

/// Asks over a Unix socket; getting there may take `limit`, and the answer as long again.
pub fn over_socket(socket: &Path, path: &str, body: &[u8], limit: Duration) -> io::Result<Answer> {
    // For want of a descriptor for the connection an agent may leave it unaccepted, and `connect` waits for a place in the
    // queue as long as a write may take.
    let stream = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    stream.set_read_timeout(Some(limit))?;
    stream.set_write_timeout(Some(limit))?;
    stream.connect(&SockAddr::unix(socket)?)?;
    exchange(UnixStream::from(stream), &head("POST", path, "agent", None, body.len()), body)
}

/// An API server and who asks it.
#[derive(Debug, Clone, Copy)]
pub struct ApiServer<'a> {
    /// `ADDRESS:PORT`.
    pub address: &'a str,
    /// PEM of the certificates that its certificate must chain to.
    pub ca: &'a str,
    pub token: &'a str,
}

/// GETs `path`, or POSTs a body to it, over TLS.
pub fn to_api(api: ApiServer<'_>, path: &str, body: Option<&[u8]>) -> io::Result<Answer> {
    let ApiServer { address: server, ca, token } = api;
    let invalid = |why: String| io::Error::new(io::ErrorKind::InvalidInput, why);
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(ca.as_bytes()) {
        let certificate = certificate.map_err(|error| invalid(format!("the API server's roots: {error}")))?;
        roots.add(certificate).map_err(|error| invalid(format!("the API server's roots: {error}")))?;
    }
    // Names are not looked up: the plugin is linked to no C library that could ask a node's name services.
    let address: SocketAddr = server
        .parse()
        .map_err(|_| invalid("no IP address and port; is KUBERNETES_SERVICE_HOST a name?".to_owned()))?;
    let name = ServerName::from(address.ip());
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| invalid(error.to_string()))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    let session =
        ClientConnection::new(Arc::new(config), name).map_err(|error| invalid(error.to_string()))?;
    let stream = TcpStream::connect_timeout(&address, CONNECT)?;
    stream.set_read_timeout(Some(CONNECT))?;
    stream.set_write_timeout(Some(CONNECT))?;
    let method = if body.is_some() { "POST" } else { "GET" };
    let body = body.unwrap_or_default();
    exchange(StreamOwned::new(session, stream), &head(method, path, server, Some(token), body.len()), body)
}

fn head(method: &str, path: &str, host: &str, token: Option<&str>, length: usize) -> String {
    let token = token.map(|token| format!("Authorization: Bearer {token}\r\n")).unwrap_or_default();
    format!(
        "{method} {path} HTTP/1.0\r\nHost: {host}\r\nAccept: application/json\r\n{token}\
         Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    )
}

fn exchange(mut stream: impl Read + Write, head: &str, body: &[u8]) -> io::Result<Answer> {
    stream.write_all(head.as_bytes())?;
    stream.write_all(body)?;
    stream.flush()?;
    let mut answer = Vec::new();
    match stream.take(MAX_ANSWER).read_to_end(&mut answer) {
        // A TLS connection that ends without a farewell; what is missing shows in the body.
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {}
        result => drop(result?),
    }
    parse(&answer).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "the answer is no HTTP"))
}

fn parse(answer: &[u8]) -> Option<Answer> {
    let end = answer.windows(4).position(|window| window == b"\r\n\r\n")?;
    let head = std::str::from_utf8(&answer[..end]).ok()?;
    let status = head.strip_prefix("HTTP/1.")?.split(' ').nth(1)?.parse().ok()?;
    Some(Answer { status, body: answer[end + 4..].to_vec() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read_and_nonsense_is_not() {
        let answer = parse(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\n{}").unwrap();
        assert_eq!((answer.status, answer.body.as_slice()), (403, &b"{}"[..]));
        for nonsense in
            [&b""[..], b"HTTP/1.1 200", b"SSH-2.0\r\n\r\n", b"HTTP/1.1 x\r\n\r\n", b"\xff\r\n\r\n"]
        {
            assert!(parse(nonsense).is_none(), "{nonsense:?}");
        }
    }

    #[test]
    fn an_agent_that_accepts_nobody_is_given_up() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.sock");
        let address = SockAddr::unix(&path).unwrap();
        let [listener, waiting] = [(); 2].map(|()| Socket::new(Domain::UNIX, Type::STREAM, None).unwrap());
        listener.bind(&address).unwrap();
        // There is a place for one in this queue.
        listener.listen(0).unwrap();
        waiting.connect(&address).unwrap();
        let (tell, told) = std::sync::mpsc::channel();
        // It would not end, otherwise.
        std::thread::spawn(move || tell.send(over_socket(&path, "/", b"", Duration::from_millis(200))));
        let answer = told.recv_timeout(Duration::from_secs(10)).expect("it still waits");
        assert_eq!(answer.unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn an_api_server_is_an_address_and_not_a_name() {
        for address in ["localhost:443", "127.0.0.1", "::1:443"] {
            let error = to_api(ApiServer { address, ca: "", token: "" }, "/", None).unwrap_err().to_string();
            assert!(error.contains("no IP address"), "{address}: {error}");
        }
    }
}
