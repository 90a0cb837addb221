//! What the demo shows as tables: bytes of the wire, and connections as the agents count them. Pure.

use std::collections::BTreeMap;

use weft_testbed::Metrics;

const OPENED: &str = "weft_tcp_connections_opened_total";

/// The first `lines` lines of 16 bytes, as `hexdump -C` shows them.
pub fn hexdump(bytes: &[u8], lines: usize) -> String {
    let mut text = String::new();
    for (number, line) in bytes.chunks(16).take(lines).enumerate() {
        let hex: String = line.iter().map(|byte| format!("{byte:02x} ")).collect();
        let readable: String = line
            .iter()
            .map(|byte| if byte.is_ascii_graphic() || *byte == b' ' { char::from(*byte) } else { '.' })
            .collect();
        text.push_str(&format!("{:04x}  {hex:<48} |{readable}|\n", number * 16));
    }
    text
}

/// Who talks to whom, from the metrics of each node's agent.
pub fn connections(nodes: &[(&str, Metrics)]) -> String {
    let header = [
        "node",
        "reporter",
        "source identity",
        "destination identity",
        "security",
        "opened",
        "sent",
        "received",
    ];
    let mut rows = vec![header.map(str::to_owned)];
    for (node, metrics) in nodes {
        for (labels, opened) in metrics.samples(OPENED) {
            let pairs: Vec<(&str, &str)> =
                labels.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
            let sum = |name: &str| bytes(metrics.sum(name, &pairs));
            let label = |name: &str| labels.get(name).cloned().unwrap_or_default();
            rows.push([
                (*node).to_owned(),
                label("reporter"),
                identity(labels, "source"),
                identity(labels, "destination"),
                label("security"),
                format!("{opened}"),
                sum("weft_tcp_sent_bytes_total"),
                sum("weft_tcp_received_bytes_total"),
            ]);
        }
    }
    rows[1..].sort();
    align(&rows)
}

/// `ns/shop/sa/web`: what follows the trust domain.
fn identity(labels: &BTreeMap<String, String>, side: &str) -> String {
    let principal = labels.get(&format!("{side}_principal")).map_or("", String::as_str);
    principal.split_once("/ns/").map_or_else(|| principal.to_owned(), |(_, rest)| format!("ns/{rest}"))
}

fn bytes(value: f64) -> String {
    // The sum of nothing is -0.
    let value = value + 0.0;
    match value {
        0.0..1e3 => format!("{value} B"),
        1e3..1e6 => format!("{:.1} kB", value / 1e3),
        _ => format!("{:.1} MB", value / 1e6),
    }
}

fn align<const N: usize>(rows: &[[String; N]]) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..N).map(width).collect();
    let line = |row: &[String; N]| {
        let cells: Vec<String> =
            row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        cells.join("  ").trim_end().to_owned() + "\n"
    };
    rows.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_shown_beside_their_letters() {
        let text = hexdump(b"GET / HTTP/1.1\r\nhost", 9);
        assert_eq!(
            text,
            "0000  47 45 54 20 2f 20 48 54 54 50 2f 31 2e 31 0d 0a  |GET / HTTP/1.1..|\n\
             0010  68 6f 73 74                                      |host|\n"
        );
        assert_eq!(hexdump(&[0; 64], 2).lines().count(), 2);
    }

    #[test]
    fn a_row_joins_the_counters_of_one_pair() -> anyhow::Result<()> {
        let metrics = Metrics::parse(
            "weft_tcp_connections_opened_total{reporter=\"source\",source_principal=\"spiffe://cluster.local/ns/shop/sa/client\",\
             destination_principal=\"spiffe://cluster.local/ns/shop/sa/web\",security=\"mutual_tls\"} 3\n\
             weft_tcp_sent_bytes_total{reporter=\"source\",source_principal=\"spiffe://cluster.local/ns/shop/sa/client\",\
             destination_principal=\"spiffe://cluster.local/ns/shop/sa/web\",security=\"mutual_tls\"} 1500\n",
        )?;
        let table = connections(&[("north", metrics)]);
        let row: Vec<&str> = table.lines().nth(1).unwrap_or_default().split_whitespace().collect();
        assert_eq!(
            row,
            [
                "north",
                "source",
                "ns/shop/sa/client",
                "ns/shop/sa/web",
                "mutual_tls",
                "3",
                "1.5",
                "kB",
                "0",
                "B"
            ]
        );
        Ok(())
    }
}
