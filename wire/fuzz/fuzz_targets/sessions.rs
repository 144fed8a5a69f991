//! See `wire/tests/hostile/sessions.rs`, where the bodies and what they check are.
#![no_main]

#[allow(dead_code, reason = "each target uses one of the bodies")]
#[path = "../../tests/hostile/bodies.rs"]
mod bodies;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let _ = bodies::sessions::agent(data);
    let _ = bodies::sessions::client(data);
});
