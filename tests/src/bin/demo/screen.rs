//! How the demo looks: short lines, colour and pauses only where a person watches.

use std::env;
use std::io::{IsTerminal, stdout};
use std::time::Duration;

use anyhow::Result;
use weft_testbed::poll;

const BOLD: &str = "1";
const DIM: &str = "2";
const RED: &str = "31";
const GREEN: &str = "32";
const YELLOW: &str = "33";
const CYAN: &str = "36";

/// Where the story is told.
#[derive(Debug)]
pub struct Screen {
    watched: bool,
    colour: bool,
}

impl Screen {
    pub fn new() -> Screen {
        let watched = stdout().is_terminal();
        let colour = watched && env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        Screen { watched, colour }
    }

    /// The heading of a step.
    pub fn step(&self, title: &str) {
        self.pause(1500);
        println!(
            "\n{}",
            self.paint(
                BOLD,
                &format!("── {title} {}", "─".repeat(74usize.saturating_sub(title.chars().count())))
            )
        );
        self.pause(400);
    }

    /// What happens and why.
    pub fn say(&self, text: &str) {
        println!("{text}");
        self.pause(700);
    }

    /// What a person would type.
    pub fn command(&self, place: &str, command: &str) {
        println!("  {} {}", self.paint(DIM, &format!("{place} $")), self.paint(CYAN, command));
        self.pause(500);
    }

    /// What a program or the wire said. `highlight` is shown in yellow where it occurs.
    pub fn quote(&self, text: &str, highlight: &str) {
        for line in text.lines() {
            let shown = if highlight.is_empty() || !line.contains(highlight) {
                self.paint(DIM, line)
            } else {
                line.replace(highlight, &self.paint(YELLOW, highlight))
            };
            println!("    {shown}");
        }
        self.pause(700);
    }

    /// A line of a change to a file: `+` and `-` in colour.
    pub fn diff(&self, before: &str, after: &str) {
        for line in before.lines().filter(|line| !after.contains(line)) {
            println!("    {}", self.paint(RED, &format!("-{line}")));
        }
        for line in after.lines() {
            if before.contains(line) {
                println!("    {}", self.paint(DIM, &format!(" {line}")));
            } else {
                println!("    {}", self.paint(GREEN, &format!("+{line}")));
            }
        }
        self.pause(700);
    }

    /// Says whether `claim` held; an error goes on to the caller.
    pub fn check(&self, claim: &str, held: Result<()>) -> Result<()> {
        match held {
            Ok(()) => {
                println!("  {} {claim}", self.paint(GREEN, "✓"));
                self.pause(500);
                Ok(())
            }
            Err(error) => {
                println!("  {} {claim}", self.paint(RED, "✗"));
                Err(error)
            }
        }
    }

    pub fn failure(&self, text: &str) {
        println!("\n{} {text}", self.paint(RED, "The demo stops here:"));
    }

    fn pause(&self, milliseconds: u64) {
        if self.watched {
            poll::pause(Duration::from_millis(milliseconds));
        }
    }

    fn paint(&self, code: &str, text: &str) -> String {
        if self.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}
