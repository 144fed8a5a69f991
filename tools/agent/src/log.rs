//! Lines for the kernel's log, where the console shows them and they survive whatever the image does; standard error where there is no kernel log to write to.

use std::fs::OpenOptions;
use std::io::Write;

/// Longest line; the kernel cuts longer ones off.
const LINE_BYTES_MAX: usize = 900;

/// Writes a line, as well as possible.
pub fn line(text: &str) {
    let mut text: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    while text.len() > LINE_BYTES_MAX {
        text.pop();
    }
    // Level 5 of facility 1 (user): shown on the console unless the kernel is `quiet`.
    let line = format!("<13>mashines: {text}\n");
    let as_init = rustix::process::getpid().is_init() || std::env::var_os("MASHINES_KMSG").is_some();
    let kernel = OpenOptions::new().write(true).open("/dev/kmsg").ok().filter(|_| as_init);
    let written = kernel.is_some_and(|mut kernel| kernel.write_all(line.as_bytes()).is_ok());
    if !written {
        let _ = writeln!(std::io::stderr(), "mashines: {text}");
    }
}

/// Writes a formatted line.
#[macro_export]
macro_rules! say {
    ($($arguments:tt)*) => { $crate::log::line(&format!($($arguments)*)) };
}
