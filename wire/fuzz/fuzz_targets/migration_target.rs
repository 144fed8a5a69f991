//! See `wire/tests/hostile/bodies.rs`, where the body and what it checks are.
#![no_main]

#[allow(dead_code, reason = "each target uses one of the bodies")]
#[path = "../../tests/hostile/bodies.rs"]
mod bodies;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let _ = bodies::target(data);
});
