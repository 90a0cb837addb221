//! As much HTTP/1.1 client as asking our own programs for their state takes, and the API server through `kubectl proxy`.

use std::io::{Read, Write};

use anyhow::{Context, Result};

/// A reply.
#[derive(Clone, Debug)]
pub struct Reply {
    pub status: u16,
    pub body: String,
}

/// GET on a fresh connection, which is used up.
pub fn get<S>(stream: &S, path: &str) -> Result<Reply>
where
    for<'a> &'a S: Read + Write,
{
    request(stream, "GET", path)
}

/// A request without a body on a fresh connection, which is used up.
pub fn request<S>(stream: &S, method: &str, path: &str) -> Result<Reply>
where
    for<'a> &'a S: Read + Write,
{
    send(stream, method, path, "", "")
}

/// A request with a body on a fresh connection, which is used up. Without a type the body is empty.
pub fn send<S>(mut stream: &S, method: &str, path: &str, content_type: &str, body: &str) -> Result<Reply>
where
    for<'a> &'a S: Read + Write,
{
    let kind =
        if content_type.is_empty() { String::new() } else { format!("content-type: {content_type}\r\n") };
    let length = body.len();
    stream.write_all(
        format!(
            "{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n{kind}content-length: {length}\r\n\r\n{body}"
        )
        .as_bytes(),
    )?;
    let mut text = Vec::new();
    stream.read_to_end(&mut text)?;
    parse(&String::from_utf8_lossy(&text)).with_context(|| format!("the reply to {method} {path}"))
}

fn parse(text: &str) -> Result<Reply> {
    let (head, body) = text.split_once("\r\n\r\n").context("no end of headers")?;
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).context("no status")?;
    let chunked = head.to_ascii_lowercase().contains("transfer-encoding: chunked");
    Ok(Reply { status, body: if chunked { unchunk(body)? } else { body.to_owned() } })
}

fn unchunk(mut body: &str) -> Result<String> {
    let mut whole = String::new();
    loop {
        let (size, rest) = body.split_once("\r\n").context("no chunk size")?;
        let size = usize::from_str_radix(size.trim(), 16).context("chunk size")?;
        if size == 0 {
            return Ok(whole);
        }
        whole.push_str(rest.get(..size).context("a chunk is cut")?);
        body = rest.get(size + 2..).context("a chunk is cut")?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_are_read_with_and_without_chunks() -> Result<()> {
        let plain = parse("HTTP/1.1 503 Not Ready\r\na: b\r\n\r\nwaiting")?;
        assert_eq!((plain.status, plain.body.as_str()), (503, "waiting"));
        let chunked =
            parse("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n1\r\nd\r\n0\r\n\r\n")?;
        assert_eq!(chunked.body, "abcd");
        assert!(parse("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n9\r\nabc").is_err());
        Ok(())
    }
}
