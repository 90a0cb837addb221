//! `demo`: Weft at work, to be watched. Arguments and the frame around the story; the story is in `story`, how it looks
//! in `screen`. Every step checks what it shows, and the exit code is 0 only if all of it held.
#![forbid(unsafe_code)]

mod keep;
mod policy;
mod screen;
mod story;
mod tables;

use std::process::ExitCode;

use clap::Parser;

use screen::Screen;

/// Two nodes, real programs, one label. Needs root; leaves nothing behind.
#[derive(Debug, Parser)]
#[command(name = "demo")]
struct Arguments {
    /// Leave everything running in the end until Ctrl-C, and print what to type next.
    #[arg(long)]
    keep: bool,
}

fn main() -> ExitCode {
    weft_testbed::helper::run_if_asked();
    let arguments = Arguments::parse();
    let code = weft_testbed::isolated(|| {
        let screen = Screen::new();
        match story::tell(&screen, arguments.keep) {
            Ok(()) => 0,
            Err(error) => {
                screen.failure(&format!("{error:#}"));
                eprint!("{}", weft_testbed::Bed::named(story::CLUSTER).tails());
                1
            }
        }
    });
    if code == ExitCode::SUCCESS {
        println!("Everything held. The demo's namespaces, processes, programs and pins are gone.\n");
    }
    code
}
