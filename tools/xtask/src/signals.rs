//! Ctrl-C and its kin become a flag, so that whoever waits gives up in an orderly way and everything started is taken down.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use anyhow::{Context, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

static STOP: OnceLock<Arc<AtomicBool>> = OnceLock::new();

/// Someone asked this program to end.
#[derive(Debug, thiserror::Error)]
#[error("interrupted")]
pub struct Interrupted;

/// From here on the signals set a flag instead of ending the process.
///
/// # Errors
/// When the kernel refuses the handlers.
pub fn install() -> Result<()> {
    let flag = STOP.get_or_init(Arc::default);
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        signal_hook::flag::register(signal, Arc::clone(flag)).context("installing a signal handler")?;
    }
    Ok(())
}

/// To be called in every loop that waits.
///
/// # Errors
/// [`Interrupted`] once a signal has come.
pub fn check() -> Result<(), Interrupted> {
    match STOP.get() {
        Some(flag) if flag.load(Ordering::Relaxed) => Err(Interrupted),
        _ => Ok(()),
    }
}
