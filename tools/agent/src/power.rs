//! The power button, as its input device tells of it. Whoever runs the guest presses it to have the guest end in good order.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

/// `struct input_event` on 64-bit Linux: time, type, code, value.
const EVENT_BYTES: usize = 24;
const KEY_EVENT: u16 = 1;
const POWER_KEY: u16 = 116;
/// Where they are: services that see to the button themselves.
const OTHERS: [&str; 2] = ["/run/systemd/system", "/run/acpid.socket"];

/// The input devices that there are now.
pub fn buttons() -> Vec<File> {
    let devices = fs::read_dir("/dev/input").into_iter().flatten().flatten();
    devices.filter_map(|entry| File::open(entry.path()).ok()).collect()
}

/// Waits for the next event of a device; whether it is a press of the power button.
///
/// # Errors
/// When the device is gone.
pub fn is_pressed(mut device: &File) -> io::Result<bool> {
    let mut event = [0; EVENT_BYTES];
    device.read_exact(&mut event)?;
    Ok(is_press(&event))
}

/// Whether the image's own services see to it.
pub fn is_seen_to() -> bool {
    OTHERS.iter().any(|place| Path::new(place).exists())
}

fn is_press(event: &[u8; EVENT_BYTES]) -> bool {
    let word = |at: usize| u16::from_le_bytes([event[at], event[at + 1]]);
    word(16) == KEY_EVENT && word(18) == POWER_KEY && word(20) == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_press_of_the_power_key_counts() {
        let event = |kind: u8, code: u8, value: u8| {
            let mut event = [0; EVENT_BYTES];
            (event[16], event[18], event[20]) = (kind, code, value);
            event
        };
        assert!(is_press(&event(1, 116, 1)));
        for other in [event(1, 116, 0), event(1, 30, 1), event(0, 116, 1)] {
            assert!(!is_press(&other));
        }
    }
}
