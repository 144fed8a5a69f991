//! `mashined`: see the library.

use std::process::ExitCode;

use clap::Parser as _;
use dataplane::agent::{self, HostConfig};

fn main() -> ExitCode {
    let filter = tracing_subscriber::EnvFilter::try_from_env("MASHINES_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    match agent::run(HostConfig::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mashined: {error:#}");
            ExitCode::FAILURE
        }
    }
}
