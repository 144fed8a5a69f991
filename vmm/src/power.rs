//! The ports by which a guest ends itself. Pure: a port write in, the end of the guest out, if it is one.
//!
//! | port | write | meaning |
//! |---|---|---|
//! | `0x501` | byte `0x31` | power off |
//! | `0x501` | byte `0x32` | the guest panicked |
//! | `0x604` | word with bit 13 set | power off (ACPI PM1 control: sleep enable) |
//! | `0x64` | byte `0xfe` | reset (keyboard controller) |

use wire::vmm::GuestEnd;

const EXIT_PORT: u16 = 0x501;
const PM1_CONTROL_PORT: u16 = 0x604;
const PM1_SLEEP_ENABLE: u16 = 1 << 13;
const KEYBOARD_COMMAND_PORT: u16 = 0x64;

/// How the guest ends with this write, if it does.
pub fn end_of(port: u16, data: &[u8]) -> Option<GuestEnd> {
    match (port, data) {
        (EXIT_PORT, [0x31]) => Some(GuestEnd::PowerOff),
        (EXIT_PORT, [0x32]) => Some(GuestEnd::Panic),
        (KEYBOARD_COMMAND_PORT, [0xfe]) => Some(GuestEnd::Reset),
        (PM1_CONTROL_PORT, &[low, high]) if u16::from_le_bytes([low, high]) & PM1_SLEEP_ENABLE != 0 => {
            Some(GuestEnd::PowerOff)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_documented_writes_end_the_guest() {
        assert_eq!(end_of(0x501, &[0x31]), Some(GuestEnd::PowerOff));
        assert_eq!(end_of(0x501, &[0x32]), Some(GuestEnd::Panic));
        assert_eq!(end_of(0x604, &[0x00, 0x20]), Some(GuestEnd::PowerOff));
        assert_eq!(end_of(0x64, &[0xfe]), Some(GuestEnd::Reset));
        for (port, data) in
            [(0x501, &[0u8][..]), (0x501, &[0x31, 0]), (0x604, &[0, 0x10]), (0x64, &[0]), (0x60, &[0xfe])]
        {
            assert_eq!(end_of(port, data), None, "{port:#x} {data:x?}");
        }
    }
}
