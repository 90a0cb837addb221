//! Series of measurements, their medians, and how they are printed. Pure.

use serde_json::{Value, json};

/// What a work must reach. For people: no test asserts a speed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Floor {
    /// At least this much of plain TCP.
    Ratio(f64),
    /// At most this much of what it is compared with; said with the spread of the rounds.
    RatioAtMost(f64),
    /// At most so many of the unit.
    AtMost(f64),
}

/// All rounds of one work.
#[derive(Clone, Debug)]
pub struct Series {
    pub name: String,
    unit: &'static str,
    floor: Option<Floor>,
    direct: Vec<f64>,
    weft: Vec<f64>,
    /// The part of `weft` that is the agent's own data, where it is memory.
    anonymous: Vec<f64>,
}

impl Series {
    pub fn new(name: &str, unit: &'static str, floor: Option<Floor>) -> Series {
        Series {
            name: name.to_owned(),
            unit,
            floor,
            direct: Vec::new(),
            weft: Vec::new(),
            anonymous: Vec::new(),
        }
    }

    /// One round of both.
    pub fn add(&mut self, direct: f64, weft: f64) {
        self.direct.push(direct);
        self.weft.push(weft);
    }

    /// One round of memory, which plain TCP has no counterpart of: all of it, and the part that is data.
    pub fn add_memory(&mut self, resident: f64, anonymous: f64) {
        self.weft.push(resident);
        self.anonymous.push(anonymous);
    }

    /// A line about the newest round.
    pub fn progress(&self, run: u32, runs: u32) -> String {
        let weft = self.weft.last().copied().unwrap_or_default();
        let figures = match self.direct.last() {
            Some(direct) => format!("direct {}, weft {}", number(*direct), number(weft)),
            None => format!(
                "{} ({} anonymous)",
                number(weft),
                number(self.anonymous.last().copied().unwrap_or_default())
            ),
        };
        format!("run {run} of {runs}: {}: {figures} {}", self.name, self.unit)
    }

    fn direct(&self) -> Option<f64> {
        median(&self.direct)
    }

    fn weft(&self) -> Option<f64> {
        median(&self.weft)
    }

    /// The median of the rounds' ratios: both sides of one round saw the same machine.
    fn ratio(&self) -> Option<f64> {
        median(&self.ratios())
    }

    fn ratios(&self) -> Vec<f64> {
        self.direct.iter().zip(&self.weft).map(|(direct, weft)| weft / direct).collect()
    }

    /// The median of how far the rounds' ratios are from their median.
    fn spread(&self) -> Option<f64> {
        let middle = self.ratio()?;
        median(&self.ratios().iter().map(|ratio| (ratio - middle).abs()).collect::<Vec<_>>())
    }

    fn remark(&self) -> String {
        let anonymous = median(&self.anonymous).map(|value| format!("({} anonymous)", number(value)));
        let spread = self.spread().filter(|_| matches!(self.floor, Some(Floor::RatioAtMost(_))));
        let spread = spread.zip(self.ratio()).map(|(spread, ratio)| {
            format!("({ratio:.3}; half of {} rounds within {spread:.3} of it)", self.direct.len())
        });
        let more = spread.or(anonymous).unwrap_or_default();
        [self.floor(), more].join(" ").trim().to_owned()
    }

    fn floor(&self) -> String {
        let (text, met) = match self.floor {
            None => return String::new(),
            Some(Floor::Ratio(floor)) => {
                (format!("{floor:.2}"), self.ratio().is_some_and(|ratio| ratio >= floor))
            }
            Some(Floor::RatioAtMost(most)) => {
                (format!("{most:.2}"), self.ratio().is_some_and(|ratio| ratio <= most))
            }
            Some(Floor::AtMost(most)) => {
                (format!("{most} {}", self.unit), self.weft().is_some_and(|weft| weft < most))
            }
        };
        format!("{text} {}", if met { "met" } else { "NOT MET" })
    }
}

fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() % 2 {
        1 => Some(sorted[middle]),
        _ if sorted.is_empty() => None,
        _ => Some((sorted[middle - 1] + sorted[middle]) / 2.0),
    }
}

/// An array of `{"work", "unit", "direct", "weft", "ratio"}`; `direct` and `ratio` are null where plain TCP has no
/// counterpart.
pub fn json(all: &[Series]) -> Value {
    let rounded = |value: Option<f64>| value.map(|value| (value * 1e4).round() / 1e4);
    all.iter()
        .map(|series| {
            json!({
                "work": series.name,
                "unit": series.unit,
                "direct": rounded(series.direct()),
                "weft": rounded(series.weft()),
                "ratio": rounded(series.ratio()),
            })
        })
        .collect()
}

pub fn table(all: &[Series], runs: u32) -> String {
    let text = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), number);
    let mut rows = vec![["work", "unit", "direct", "weft", "ratio", "floor"].map(str::to_owned)];
    rows.extend(all.iter().map(|series| {
        [
            series.name.clone(),
            series.unit.to_owned(),
            text(series.direct()),
            text(series.weft()),
            series.ratio().map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}")),
            series.remark(),
        ]
    }));
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let widths: [usize; 6] = std::array::from_fn(width);
    let mut printed = String::new();
    for [work, unit, direct, weft, ratio, floor] in &rows {
        let [a, b, c, d, e, _] = widths;
        let line = format!("{work:<a$}  {unit:<b$}  {direct:>c$}  {weft:>d$}  {ratio:>e$}  {floor}");
        printed.push_str(line.trim_end());
        printed.push('\n');
    }
    let runs = if runs == 1 { "One run".to_owned() } else { format!("Medians of {runs} runs") };
    printed.push_str(&format!(
        "{runs}. Ratio: weft / direct, round by round (for p99, higher is slower). Memory: resident, of the\n\
         larger of the two agents; anonymous is its data, the rest is mostly its program.\n"
    ));
    printed
}

/// Three digits where it is small, none behind the point where it is large.
fn number(value: f64) -> String {
    match value.abs() {
        0.0..10.0 => format!("{value:.2}"),
        10.0..1000.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Vec<Series> {
        let mut stream = Series::new("stream-1", "Gbit/s", Some(Floor::Ratio(0.29)));
        for (direct, weft) in [(10.0, 3.0), (20.0, 2.0), (12.0, 6.0)] {
            stream.add(direct, weft);
        }
        let mut memory = Series::new("memory-1000", "MB RSS", Some(Floor::AtMost(20.0)));
        memory.add_memory(25.0, 9.0);
        vec![stream, memory]
    }

    #[test]
    fn the_median_is_in_the_middle() {
        for (values, expected) in [
            (vec![], None),
            (vec![3.0], Some(3.0)),
            (vec![9.0, 1.0, 2.0], Some(2.0)),
            (vec![4.0, 1.0], Some(2.5)),
        ] {
            assert_eq!(median(&values), expected);
        }
    }

    #[test]
    fn a_cost_is_said_with_its_spread() {
        let mut cost = Series::new("policies-32-cpu", "us CPU", Some(Floor::RatioAtMost(1.05)));
        for with in [102.0, 104.0, 101.0, 150.0, 103.0] {
            cost.add(100.0, with);
        }
        assert_eq!(cost.remark(), "1.05 met (1.030; half of 5 rounds within 0.010 of it)");
        cost.floor = Some(Floor::RatioAtMost(1.02));
        assert!(cost.remark().starts_with("1.02 NOT MET"));
    }

    #[test]
    fn the_array_has_the_keys_that_scripts_read() {
        assert_eq!(
            json(&sample()),
            json!([
                {"work": "stream-1", "unit": "Gbit/s", "direct": 12.0, "weft": 3.0, "ratio": 0.3},
                {"work": "memory-1000", "unit": "MB RSS", "direct": null, "weft": 25.0, "ratio": null},
            ])
        );
    }

    #[test]
    fn the_table_says_which_floor_is_met() {
        let table = table(&sample(), 3);
        let words =
            |line: usize| table.lines().nth(line).unwrap_or_default().split_whitespace().collect::<Vec<_>>();
        assert_eq!(words(1), ["stream-1", "Gbit/s", "12.0", "3.00", "0.30", "0.29", "met"]);
        assert_eq!(
            words(2),
            [
                "memory-1000",
                "MB",
                "RSS",
                "-",
                "25.0",
                "-",
                "20",
                "MB",
                "RSS",
                "NOT",
                "MET",
                "(9.00",
                "anonymous)"
            ]
        );
    }
}
