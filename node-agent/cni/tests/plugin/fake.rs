//! Who the plugin talks to, as far as it matters: an agent on a Unix socket and an API server behind real TLS. Each answers
//! from a function and remembers what it was asked. The threads end with the test's process.

use std::{
    collections::HashMap,
    io::{Read, Write},
    net::TcpListener,
    os::unix::net::UnixListener,
    path::Path,
    sync::{Arc, Mutex},
    thread,
};

use rustls::{ServerConfig, ServerConnection, StreamOwned, pki_types::PrivateKeyDer};
use serde_json::Value;

/// Requests as they came: the head, and the body.
pub type Heard = Arc<Mutex<Vec<(String, String)>>>;

/// An agent that gives every request this answer. None: it hangs up without one.
pub fn agent(socket: &Path, answer: Option<(u16, Value)>) -> Heard {
    let (listener, heard) = (UnixListener::bind(socket).unwrap(), Heard::default());
    let remember = heard.clone();
    thread::spawn(move || {
        for stream in listener.incoming() {
            serve(stream.unwrap(), &remember, |_| answer.clone());
        }
    });
    heard
}

/// A running API server.
pub struct Api {
    /// `HOST:PORT`.
    pub address: String,
    /// PEM of what its certificate chains to.
    pub ca: String,
    pub heard: Heard,
}

/// An API server with these objects, by path; anything else is not found.
pub fn api(objects: &[(&str, u16, Value)]) -> Api {
    let rcgen::CertifiedKey { cert, signing_key } =
        rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    let key = PrivateKeyDer::try_from(signing_key.serialize_der()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![cert.der().clone()], key)
        .unwrap();
    let (config, listener) = (Arc::new(config), TcpListener::bind("127.0.0.1:0").unwrap());
    let address = listener.local_addr().unwrap().to_string();
    let objects: HashMap<String, (u16, Value)> = objects
        .iter()
        .map(|(path, status, object)| ((*path).to_owned(), (*status, object.clone())))
        .collect();
    let heard = Heard::default();
    let remember = heard.clone();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let session = ServerConnection::new(config.clone()).unwrap();
            serve(StreamOwned::new(session, stream.unwrap()), &remember, |head| {
                let path = head.split(' ').nth(1).unwrap_or_default();
                Some(objects.get(path).cloned().unwrap_or((404, Value::Null)))
            });
        }
    });
    Api { address, ca: cert.pem(), heard }
}

fn serve(mut stream: impl Read + Write, heard: &Heard, answer: impl Fn(&str) -> Option<(u16, Value)>) {
    // A client that does not trust this server, or gave up, is no reason to end.
    let Some((head, body)) = receive(&mut stream) else { return };
    let answer = answer(&head);
    heard.lock().unwrap().push((head, body));
    if let Some((status, body)) = answer {
        let _ = write!(stream, "HTTP/1.0 {status} Whatever\r\nContent-Type: application/json\r\n\r\n{body}");
        let _ = stream.flush();
    }
}

fn receive(stream: &mut impl Read) -> Option<(String, String)> {
    let (mut text, mut buffer) = (String::new(), [0; 4096]);
    loop {
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let length = head.lines().find_map(|line| line.strip_prefix("Content-Length: "))?;
            if body.len() >= length.parse::<usize>().ok()? {
                return Some((head.to_owned(), body.to_owned()));
            }
        }
        let count = stream.read(&mut buffer).ok().filter(|count| *count > 0)?;
        text.push_str(std::str::from_utf8(&buffer[..count]).ok()?);
    }
}
