//! Reading metrics in the Prometheus text format. Pure.

use std::collections::BTreeMap;

use anyhow::{Context, Result};

/// One scrape.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    samples: Vec<Sample>,
}

#[derive(Clone, Debug)]
struct Sample {
    name: String,
    labels: BTreeMap<String, String>,
    value: f64,
}

impl Metrics {
    /// Reads a scrape; comments are skipped, a line that is no sample is an error.
    pub fn parse(text: &str) -> Result<Metrics> {
        let samples = text
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty() && !line.starts_with('#'))
            .map(|line| parse_sample(line).with_context(|| format!("not a sample: {line:?}")))
            .collect::<Result<_>>()?;
        Ok(Metrics { samples })
    }

    /// Sum of the samples called `name` that carry all of `labels`. 0 where there is none: counters without a sample yet
    /// have counted nothing.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        // Folded from +0: the sum of no floats is -0.
        self.matching(name, labels).fold(0.0, |sum, sample| sum + sample.value)
    }

    /// Whether a sample called `name` carries all of `labels`.
    pub fn has(&self, name: &str, labels: &[(&str, &str)]) -> bool {
        self.matching(name, labels).next().is_some()
    }

    /// Values of `label` on samples called `name` that are not zero, sorted, each once.
    pub fn values_of(&self, name: &str, label: &str) -> Vec<String> {
        let mut values: Vec<_> = self
            .matching(name, &[])
            .filter(|sample| sample.value != 0.0)
            .filter_map(|sample| sample.labels.get(label).cloned())
            .collect();
        values.sort();
        values.dedup();
        values
    }

    /// Every sample called `name` as its labels and value.
    pub fn samples<'a>(&'a self, name: &'a str) -> impl Iterator<Item = (&'a BTreeMap<String, String>, f64)> {
        self.matching(name, &[]).map(|sample| (&sample.labels, sample.value))
    }

    fn matching<'a>(&'a self, name: &'a str, labels: &'a [(&str, &str)]) -> impl Iterator<Item = &'a Sample> {
        self.samples.iter().filter(move |sample| {
            sample.name == name
                && labels
                    .iter()
                    .all(|(key, value)| sample.labels.get(*key).is_some_and(|found| found == value))
        })
    }
}

fn parse_sample(line: &str) -> Option<Sample> {
    let name_end = line.find(['{', ' '])?;
    let (name, mut rest) = line.split_at(name_end);
    let mut labels = BTreeMap::new();
    if let Some(inside) = rest.strip_prefix('{') {
        rest = inside;
        loop {
            rest = rest.trim_start_matches([',', ' ']);
            if let Some(after) = rest.strip_prefix('}') {
                rest = after;
                break;
            }
            let (key, after) = rest.split_once("=\"")?;
            let (value, after) = quoted(after)?;
            labels.insert(key.to_owned(), value);
            rest = after;
        }
    }
    let value = rest.split_whitespace().next()?.parse().ok()?;
    Some(Sample { name: name.to_owned(), labels, value })
}

/// The text up to the closing quote, without its escapes, and what follows.
fn quoted(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut characters = text.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return Some((value, &text[at + 1..])),
            '\\' => match characters.next()?.1 {
                'n' => value.push('\n'),
                other => value.push(other),
            },
            other => value.push(other),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_summed_by_their_labels() -> Result<()> {
        let metrics = Metrics::parse(
            "# HELP x y\n# TYPE x counter\nx_total{reason=\"a\",to=\"1\"} 3\nx_total{reason=\"b\",to=\"1\"} 4 1700\n\
             x_total{reason=\"q\\\"}\",to=\"2\"} 0\ny 1.5\n# EOF\n",
        )?;
        assert_eq!(metrics.sum("x_total", &[]), 7.0);
        assert_eq!(metrics.sum("x_total", &[("reason", "b")]), 4.0);
        assert_eq!(metrics.sum("x_total", &[("reason", "a"), ("to", "2")]), 0.0);
        assert_eq!(metrics.sum("y", &[]), 1.5);
        assert!(metrics.has("x_total", &[("reason", "q\"}")]) && !metrics.has("z", &[]));
        assert_eq!(metrics.values_of("x_total", "reason"), ["a", "b"]);
        Ok(())
    }

    #[test]
    fn what_is_no_sample_is_an_error() {
        for line in ["x", "x{a=\"b\" 1", "x{a=\"b\"}", "x one"] {
            assert!(Metrics::parse(line).is_err(), "{line}");
        }
    }
}
