//! How xtask speaks: short lines on standard error, colour only on a terminal. Standard output is left to results.

use std::env;
use std::io::{IsTerminal, stderr};
use std::sync::OnceLock;
use std::time::Duration;

const BOLD: &str = "1";
const DIM: &str = "2";
const RED: &str = "31";
const GREEN: &str = "32";
const YELLOW: &str = "33";

fn paint(code: &str, text: &str) -> String {
    static COLOUR: OnceLock<bool> = OnceLock::new();
    let colour = *COLOUR
        .get_or_init(|| stderr().is_terminal() && env::var_os("NO_COLOR").is_none_or(|v| v.is_empty()));
    if colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
}

/// The start of something that takes a while.
pub fn step(text: &str) {
    eprintln!("{} {}", paint(BOLD, "==>"), paint(BOLD, text));
}

/// A detail of the step that is under way.
pub fn detail(text: &str) {
    eprintln!("    {text}");
}

/// A sign of life from the step that is under way.
pub fn progress(text: &str) {
    eprintln!("    {}", paint(DIM, text));
}

pub fn success(text: &str) {
    eprintln!("{} {text}", paint(GREEN, " ok"));
}

pub fn warning(text: &str) {
    eprintln!("{} {text}", paint(YELLOW, "warning:"));
}

pub fn failure(text: &str) {
    eprintln!("{} {text}", paint(RED, "error:"));
}

/// `850 ms`, `12.3 s` or `4 min 07 s`.
pub fn duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0 => format!("{} ms", duration.as_millis()),
        1..60 => format!("{:.1} s", duration.as_secs_f64()),
        _ => format!("{} min {:02} s", seconds / 60, seconds % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::duration;
    use std::time::Duration;

    #[test]
    fn durations_are_readable() {
        for (milliseconds, expected) in [
            (0, "0 ms"),
            (850, "850 ms"),
            (12_340, "12.3 s"),
            (60_000, "1 min 00 s"),
            (247_900, "4 min 07 s"),
        ] {
            assert_eq!(duration(Duration::from_millis(milliseconds)), expected);
        }
    }
}
