//! `/init` of the initramfs, the agent, and its two built-in programs.
//!
//! ```text
//! /init                                  (as the kernel's first process)
//! mashine-agent serve [--vsock PORT | --unix PATH]
//! mashine-agent guard [--vsock PORT | --unix PATH]      (the same, started again whenever it ends)
//! mashine-agent tar-export PATH > ARCHIVE
//! mashine-agent tar-import PATH < ARCHIVE
//! ```

use std::ffi::OsString;
use std::io;
use std::path::Path;
use std::process::ExitCode;

use agent::daemon::{self, listen::Address};
use agent::{archive, guard, init, say};

const USAGE: &str =
    "usage: mashine-agent serve|guard [--vsock PORT | --unix PATH] | tar-export PATH | tar-import PATH";

fn main() -> ExitCode {
    if rustix::process::getpid().is_init() {
        init::run();
    }
    // Started by way of /proc/self/exe it would be listed as `exe`.
    let _cosmetic = rustix::thread::set_name(c"mashine-agent");
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(|word| word.to_str().unwrap_or_default()).collect();
    let done = match words.as_slice() {
        ["tar-export", _] => {
            archive::pack(Path::new(&arguments[1]), io::stdout().lock()).map_err(|e| e.to_string())
        }
        ["tar-import", _] => {
            archive::unpack(io::stdin().lock(), Path::new(&arguments[1])).map_err(|e| e.to_string())
        }
        ["guard", rest @ ..] if address(rest).is_some() => guard::run(rest),
        ["serve", rest @ ..] => address(rest).map_or_else(|| Err(USAGE.to_owned()), |at| serve(&at)),
        _ => Err(USAGE.to_owned()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mashine-agent: {error}");
            ExitCode::FAILURE
        }
    }
}

fn address(words: &[&str]) -> Option<Address> {
    match words {
        [] => Some(Address::Vsock(wire::agent::VSOCK_PORT)),
        ["--unix", path] => Some(Address::Unix(path.into())),
        ["--vsock", port] => port.parse().ok().map(Address::Vsock),
        _ => None,
    }
}

fn serve(address: &Address) -> Result<(), String> {
    daemon::serve(address).map_err(|error| {
        say!("the agent ends: {error}");
        error.to_string()
    })
}
