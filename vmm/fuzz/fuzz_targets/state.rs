//! `cargo +nightly fuzz run state` in `vmm/`: see `bodies.rs`.

#![no_main]

#[path = "../bodies.rs"]
#[allow(dead_code)]
mod bodies;

use std::sync::LazyLock;

static FIXTURE: LazyLock<bodies::Fixture> = LazyLock::new(bodies::Fixture::new);

libfuzzer_sys::fuzz_target!(|data: &[u8]| FIXTURE.state(data));
