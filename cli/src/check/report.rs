//! What a check found, and how it is printed: as a page for people, the same without what is fine, or as JSON.

use std::fmt::Write as _;

use serde::Serialize;

/// Everything that was checked.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Whether nothing is broken; warnings do not count.
    pub success: bool,
    pub categories: Vec<Category>,
}

/// Checks that belong together.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Category {
    #[serde(rename = "categoryName")]
    pub name: &'static str,
    pub checks: Vec<Check>,
}

/// One thing that should be so.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What should be so, as a statement.
    pub description: String,
    pub result: Outcome,
    /// What is wrong, a line each.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub error: Vec<String>,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    Success,
    Warning,
    Error,
}

impl Check {
    pub fn success(description: impl Into<String>) -> Self {
        Self { description: description.into(), result: Outcome::Success, error: Vec::new(), hint: None }
    }

    pub fn error(description: impl Into<String>, what: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::of(Outcome::Error, description, vec![what.into()], hint)
    }

    /// Fine where nothing is wrong, else `outcome`.
    pub fn of(
        outcome: Outcome,
        description: impl Into<String>,
        wrong: Vec<String>,
        hint: impl Into<String>,
    ) -> Self {
        if wrong.is_empty() {
            return Self::success(description);
        }
        Self { description: description.into(), result: outcome, error: wrong, hint: Some(hint.into()) }
    }

    /// [`Check::of`], with what could not be found out as its error.
    pub fn from(
        outcome: Outcome,
        description: &str,
        wrong: Result<Vec<String>, String>,
        hint: impl Into<String>,
    ) -> Self {
        match wrong {
            Ok(wrong) => Self::of(outcome, description, wrong, hint),
            Err(why) => Self::unknown(description, &why),
        }
    }

    /// It could not be found out.
    pub fn unknown(description: &str, why: &str) -> Self {
        Self::error(
            description,
            format!("cannot tell: {why}"),
            "the account of your kubeconfig needs to read it",
        )
    }
}

/// How a report is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// Every check, by category
    Table,
    /// Only what is not fine
    Short,
    Json,
}

/// More lines than that of one check help nobody.
const MAX_LINES: usize = 10;

impl Report {
    pub fn new(categories: Vec<Category>) -> Self {
        let success = categories.iter().flat_map(|c| &c.checks).all(|check| check.result != Outcome::Error);
        Self { success, categories }
    }

    /// The whole text, in colour where that is wanted.
    pub fn print(&self, format: Format, colour: bool) -> String {
        match format {
            Format::Json => serde_json::to_string_pretty(self).map(|text| text + "\n").unwrap_or_default(),
            Format::Table | Format::Short => self.page(format == Format::Short, colour),
        }
    }

    fn page(&self, short: bool, colour: bool) -> String {
        let mut page = String::new();
        for category in &self.categories {
            let checks = category.checks.iter().filter(|check| !short || check.result != Outcome::Success);
            let mut checks = checks.peekable();
            if checks.peek().is_none() {
                continue;
            }
            let _ = writeln!(page, "{}\n{}", category.name, "-".repeat(category.name.len()));
            for check in checks {
                let _ = writeln!(page, "{} {}", check.result.sign(colour), check.description);
                for line in check.error.iter().take(MAX_LINES) {
                    let _ = writeln!(page, "    {line}");
                }
                if check.error.len() > MAX_LINES {
                    let _ = writeln!(page, "    and {} more", check.error.len() - MAX_LINES);
                }
                if let Some(hint) = &check.hint {
                    for (number, line) in hint.lines().enumerate() {
                        let _ = writeln!(page, "    {} {line}", if number == 0 { "->" } else { "  " });
                    }
                }
            }
            page.push('\n');
        }
        let worst = self.categories.iter().flat_map(|c| &c.checks).map(|check| check.result).max();
        let worst = worst.unwrap_or(Outcome::Success);
        let _ = writeln!(page, "Status check results are {}", worst.sign(colour));
        page
    }
}

impl Outcome {
    fn sign(self, colour: bool) -> String {
        let (sign, code) = match self {
            Self::Success => ("√", "32"),
            Self::Warning => ("‼", "33"),
            Self::Error => ("×", "31"),
        };
        if colour { format!("\x1b[1;{code}m{sign}\x1b[0m") } else { sign.to_owned() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let many = (0..12).map(|n| format!("node {n}")).collect();
        Report::new(vec![
            Category { name: "fine", checks: vec![Check::success("all is well")] },
            Category {
                name: "not-so-fine",
                checks: vec![
                    Check::success("this is"),
                    Check::of(Outcome::Warning, "that is", many, "do this\nor that"),
                ],
            },
        ])
    }

    #[test]
    fn a_page_shows_everything_and_the_short_one_what_is_not_fine() {
        let page = report().print(Format::Table, false);
        assert!(
            page.starts_with("fine\n----\n√ all is well\n\nnot-so-fine\n-----------\n√ this is\n‼ that is\n"),
            "{page}"
        );
        assert!(page.contains("    node 9\n    and 2 more\n    -> do this\n       or that\n"), "{page}");
        assert!(page.ends_with("Status check results are ‼\n"), "{page}");
        let short = report().print(Format::Short, false);
        assert!(!short.contains('√') && short.contains("‼ that is"), "{short}");
        assert!(report().print(Format::Table, true).contains("\x1b[1;33m‼\x1b[0m that is"));
    }

    #[test]
    fn json_has_the_shape_that_scripts_know() {
        let mut report = report();
        assert!(report.success, "a warning is no failure");
        report.categories[0].checks.push(Check::error("here", "no", "do"));
        let json: serde_json::Value =
            serde_json::from_str(&Report::new(report.categories).print(Format::Json, true)).unwrap();
        assert_eq!(json["success"], false);
        assert_eq!(json["categories"][0]["categoryName"], "fine");
        assert_eq!(
            json["categories"][0]["checks"][1],
            serde_json::json!({"description": "here", "result": "error", "error": ["no"], "hint": "do"})
        );
    }
}
