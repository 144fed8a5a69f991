//! `mashines`: launches, moves and looks after machines.

use std::process::ExitCode;

use clap::Parser as _;
use tools::args::Cli;
use tools::exit::{self, Failure};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return exit::report(&Failure::local("starting", error, "free some file descriptors")),
    };
    match runtime.block_on(tools::commands::run(cli)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => exit::report(&failure),
    }
}
