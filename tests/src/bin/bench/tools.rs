//! The measuring programs, iperf3 and wrk, as they are: how they are started and what their output says.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use weft_testbed::{Place, Process};

pub const IPERF_PORT: u16 = 5201;
const SERVER_START: Duration = Duration::from_secs(10);

/// What wrk found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Requests {
    pub count: u64,
    pub per_second: f64,
    /// Milliseconds within which 99 of 100 requests were answered.
    pub p99: f64,
}

pub fn iperf_server(place: &Place) -> Result<Process> {
    let port = IPERF_PORT.to_string();
    let server = place.start("iperf3", "iperf3", ["--server", "--port", &port])?;
    place.wait_for_port(IPERF_PORT, SERVER_START)?;
    Ok(server)
}

/// Received Gbit/s over `streams` connections.
pub fn iperf(place: &Place, server: SocketAddr, streams: u32, seconds: u32) -> Result<f64> {
    let (ip, port) = (server.ip().to_string(), server.port().to_string());
    let (streams, seconds) = (streams.to_string(), seconds.to_string());
    let arguments = [
        "--client",
        &ip,
        "--port",
        &port,
        "--parallel",
        &streams,
        "--time",
        &seconds,
        "--omit",
        "1",
        "--json",
    ];
    let output = place.try_run("iperf3", arguments)?;
    parse_iperf(&String::from_utf8_lossy(&output.stdout))
}

fn parse_iperf(text: &str) -> Result<f64> {
    let reply: serde_json::Value = serde_json::from_str(text).context("iperf3 printed no JSON")?;
    if let Some(error) = reply["error"].as_str() {
        bail!("iperf3: {error}");
    }
    let bits = reply["end"]["sum_received"]["bits_per_second"].as_f64();
    Ok(bits.context("iperf3 reports no received bits per second")? / 1e9)
}

/// Requests by `connections` connections at a time, kept alive unless `close`.
pub fn wrk(
    place: &Place,
    server: SocketAddr,
    connections: u32,
    close: bool,
    seconds: u32,
) -> Result<Requests> {
    // Two threads keep one core of a small machine each busy; one connection can keep but one.
    let threads = connections.min(2).to_string();
    let (connections, seconds) = (connections.to_string(), format!("{seconds}s"));
    let url = format!("http://{server}/");
    let mut arguments = vec!["--latency", "-t", &threads, "-c", &connections, "-d", &seconds];
    if close {
        arguments.extend(["-H", "Connection: close"]);
    }
    arguments.push(&url);
    let output = place.run("wrk", &arguments)?;
    parse_wrk(&String::from_utf8_lossy(&output))
}

fn parse_wrk(text: &str) -> Result<Requests> {
    let after = |start: &str| text.lines().find_map(|line| line.trim().strip_prefix(start)).map(str::trim);
    for trouble in ["Socket errors:", "Non-2xx or 3xx responses:"] {
        if let Some(what) = after(trouble) {
            bail!("requests failed, so their rate says nothing: {trouble} {what}");
        }
    }
    let per_second: f64 =
        after("Requests/sec:").and_then(|value| value.parse().ok()).context("wrk reports no rate")?;
    ensure!(per_second > 0.0, "wrk had no answer at all");
    let count = text.lines().find_map(|line| line.trim().split_once(" requests in ")?.0.parse().ok());
    let count = count.context("wrk does not say how many requests there were")?;
    let p99 = after("99%").and_then(milliseconds).context("wrk reports no p99")?;
    Ok(Requests { count, per_second, p99 })
}

/// `812.00us`, `1.20ms`, `1.02s`.
fn milliseconds(text: &str) -> Option<f64> {
    let digits = text.trim_end_matches(|character: char| character.is_ascii_alphabetic());
    let factor = match &text[digits.len()..] {
        "us" => 0.001,
        "ms" => 1.0,
        "s" => 1000.0,
        "m" => 60_000.0,
        _ => return None,
    };
    Some(digits.parse::<f64>().ok()? * factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    const WRK: &str = "Running 4s test @ http://10.42.2.10:80/\n  2 threads and 64 connections\n\
        \x20 Thread Stats   Avg      Stdev     Max   +/- Stdev\n    Latency     1.36ms  704.36us  21.03ms   91.98%\n\
        \x20   Req/Sec    23.79k     2.39k   29.35k    70.00%\n  Latency Distribution\n     50%    1.26ms\n\
        \x20    75%    1.54ms\n     90%    1.91ms\n     99%    3.35ms\n  189532 requests in 4.01s, 28.38MB read\n\
        Requests/sec:  47264.12\nTransfer/sec:      7.08MB\n";

    #[test]
    fn wrk_is_read() -> Result<()> {
        assert_eq!(parse_wrk(WRK)?, Requests { count: 189_532, per_second: 47264.12, p99: 3.35 });
        Ok(())
    }

    #[test]
    fn a_rate_with_failed_requests_is_none() {
        for trouble in
            ["  Socket errors: connect 0, read 3, write 0, timeout 0", "  Non-2xx or 3xx responses: 12"]
        {
            assert!(parse_wrk(&format!("{WRK}{trouble}\n")).is_err(), "{trouble}");
        }
        assert!(parse_wrk("Requests/sec: 0.00\n99% 0.00us").is_err());
    }

    #[test]
    fn times_have_units() {
        for (text, expected) in [
            ("812.00us", Some(0.812)),
            ("1.20ms", Some(1.2)),
            ("1.02s", Some(1020.0)),
            ("1.00m", Some(60_000.0)),
            ("1.00", None),
            ("ms", None),
        ] {
            assert_eq!(milliseconds(text), expected, "{text}");
        }
    }

    #[test]
    fn iperf_is_read_and_its_errors_are_told() -> Result<()> {
        assert_eq!(parse_iperf(r#"{"end": {"sum_received": {"bits_per_second": 4.5e9}}}"#)?, 4.5);
        let error = parse_iperf(r#"{"error": "unable to connect"}"#).map_err(|error| error.to_string());
        assert_eq!(error, Err("iperf3: unable to connect".to_owned()));
        assert!(parse_iperf("").is_err());
        Ok(())
    }
}
