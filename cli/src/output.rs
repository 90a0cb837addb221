//! Standard output.

use std::io::{self, Write};

use anyhow::{Context, Result};

/// Prints `text`. A reader such as `head` that has seen enough is no error.
pub fn print(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => result.context("standard output"),
    }
}
