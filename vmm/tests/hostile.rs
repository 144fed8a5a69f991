//! Hostile drivers and hostile archives: the bodies of the fuzz targets over pseudo-random inputs, and the cases
//! that an attacker would try first, by name.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "../fuzz/bodies.rs"]
mod bodies;

use bodies::Fixture;

/// xorshift64*: inputs that are the same in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn input(&mut self) -> Vec<u8> {
        let words = self.next() >> 57;
        (0..words).flat_map(|_| self.next().to_le_bytes()).collect()
    }
}

#[test]
fn drivers_that_do_anything() {
    let fixture = Fixture::new();
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for _ in 0..3000 {
        let input = random.input();
        fixture.virtio(&input);
    }
}

#[test]
fn archives_that_say_anything() {
    let fixture = Fixture::new();
    let mut random = Random(0xd1b5_4a32_d192_ed03);
    for _ in 0..1500 {
        let input = random.input();
        fixture.state(&input);
    }
}
