//! The platform's own registers: how a guest ends itself, and how it is told that its power button was pressed.
//!
//! | port | access | meaning |
//! |---|---|---|
//! | `0x501` | write byte `0x31`, `0x32` | power off, panic: the shortest way, for guests without ACPI |
//! | `0x505` | read byte, write byte | pvpanic: the events it knows; bit 0 = the guest panicked |
//! | `0x600` | read 32 bits | pending events (power button, new generation id); reading clears them |
//! | `0x604` | write word with bit 13 set | power off, as PM1 control of a PC |
//! | `0x608` | write byte | ACPI sleep control: bit 5 with type 5 in bits 2-4 = power off |
//! | `0x609` | read byte | ACPI sleep status: always 0, we never sleep |
//! | `0x60a` | write byte 1 | ACPI reset register |
//! | `0x64` | write byte `0xfe` | reset by the keyboard controller |
//!
//! Pending events are the chip's only state. An event that becomes pending raises [`GSI`]; so does a restore that finds one, because the edge may have been
//! lost with the source. A guest that never reads the port has one interrupt per press, and nothing grows.

use std::io;

use vm_superio::Trigger;
use wire::state::PlatformState;
use wire::vmm::GuestEnd;

use crate::serial::IrqLine;

/// The chip's interrupt.
pub const GSI: u32 = 9;
/// Pending events.
pub const EVENT_PORT: u16 = 0x600;
/// ACPI sleep control register.
pub const SLEEP_CONTROL_PORT: u16 = 0x608;
/// ACPI sleep status register.
pub const SLEEP_STATUS_PORT: u16 = 0x609;
/// ACPI reset register.
pub const RESET_PORT: u16 = 0x60a;
/// What is written to the reset register.
pub const RESET_VALUE: u8 = 1;
/// pvpanic.
pub const PANIC_PORT: u16 = 0x505;
/// The sleep type that means off (`_S5`).
pub const SLEEP_TYPE_OFF: u8 = 5;

/// The power button was pressed.
pub const EVENT_POWER_BUTTON: u32 = 1;
/// The VM generation id has changed.
pub const EVENT_GENERATION: u32 = 1 << 1;
const EVENTS: u32 = EVENT_POWER_BUTTON | EVENT_GENERATION;

const EXIT_PORT: u16 = 0x501;
const PM1_CONTROL_PORT: u16 = 0x604;
const PM1_SLEEP_ENABLE: u16 = 1 << 13;
const KEYBOARD_COMMAND_PORT: u16 = 0x64;
const SLEEP_ENABLE: u8 = 1 << 5;
/// pvpanic: the guest panicked. The only event that we say we know.
const PANICKED: u8 = 1;

/// The chip.
#[derive(Debug)]
pub struct Platform {
    pending: u32,
    generation: [u8; 16],
    line: IrqLine,
}

/// A saved state that the chip cannot have.
#[derive(Debug, thiserror::Error)]
#[error("the platform's state has events {0:#x}, which this release does not know")]
pub struct BadPlatformState(u32);

impl Platform {
    /// The chip after power-on, in a machine of generation `generation`.
    pub const fn new(line: IrqLine, generation: [u8; 16]) -> Self {
        Self { pending: 0, generation, line }
    }

    /// The machine's generation id.
    pub const fn generation(&self) -> [u8; 16] {
        self.generation
    }

    /// The machine has become another one (a copy of a snapshot): its guest is told once `generation` is in its RAM.
    ///
    /// # Errors
    /// [`io::Error`] when the interrupt cannot be raised.
    pub fn set_generation(&mut self, generation: [u8; 16]) -> io::Result<()> {
        self.generation = generation;
        self.raise(EVENT_GENERATION)
    }

    /// Presses the power button.
    ///
    /// # Errors
    /// [`io::Error`] when the interrupt cannot be raised.
    pub fn press_power_button(&mut self) -> io::Result<()> {
        self.raise(EVENT_POWER_BUTTON)
    }

    fn raise(&mut self, event: u32) -> io::Result<()> {
        self.pending |= event;
        self.line.trigger()
    }

    /// The guest reads. What is no register stays as it is.
    pub fn read(&mut self, port: u16, data: &mut [u8]) {
        match (port, data) {
            // Read whole or not at all: an event that is cleared must have been seen.
            (EVENT_PORT, data) => {
                if let Ok(whole) = <&mut [u8; 4]>::try_from(data) {
                    *whole = std::mem::take(&mut self.pending).to_le_bytes();
                }
            }
            (SLEEP_STATUS_PORT, [byte]) => *byte = 0,
            (PANIC_PORT, [byte]) => *byte = PANICKED,
            _ => {}
        }
    }

    /// Its state.
    pub const fn save(&self) -> PlatformState {
        PlatformState { pending_events: self.pending, generation_id: self.generation }
    }

    /// Takes on a saved state.
    ///
    /// # Errors
    /// [`BadPlatformState`] when it has events that are not known.
    pub fn restore(&mut self, state: &PlatformState) -> Result<(), BadPlatformState> {
        if state.pending_events & !EVENTS != 0 {
            return Err(BadPlatformState(state.pending_events));
        }
        self.pending = state.pending_events;
        self.generation = state.generation_id;
        Ok(())
    }

    /// After a restore: an edge that may have been lost is given once more.
    pub fn resume(&self) {
        if self.pending != 0 {
            // Fails only when the counter is full, and then the interrupt is pending anyway.
            let _pending = self.line.trigger();
        }
    }
}

/// Whether one of the chip's registers can be read at `port`.
pub const fn is_readable(port: u16) -> bool {
    matches!(port, EVENT_PORT | SLEEP_STATUS_PORT | PANIC_PORT)
}

/// How the guest ends with this write, if it does. Pure.
pub fn end_of(port: u16, data: &[u8]) -> Option<GuestEnd> {
    match (port, data) {
        (EXIT_PORT, [0x31]) => Some(GuestEnd::PowerOff),
        (EXIT_PORT, [0x32]) => Some(GuestEnd::Panic),
        (PANIC_PORT, &[events]) if events & PANICKED != 0 => Some(GuestEnd::Panic),
        (KEYBOARD_COMMAND_PORT, [0xfe]) | (RESET_PORT, [RESET_VALUE]) => Some(GuestEnd::Reset),
        (PM1_CONTROL_PORT, &[low, high]) if u16::from_le_bytes([low, high]) & PM1_SLEEP_ENABLE != 0 => {
            Some(GuestEnd::PowerOff)
        }
        (SLEEP_CONTROL_PORT, &[value]) if value & SLEEP_ENABLE != 0 && value >> 2 & 7 == SLEEP_TYPE_OFF => {
            Some(GuestEnd::PowerOff)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_sys_util::eventfd::EventFd;

    fn chip() -> (Platform, EventFd) {
        let event = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        (Platform::new(IrqLine::new(event.try_clone().unwrap()), [7; 16]), event)
    }

    fn events(chip: &mut Platform) -> u32 {
        let mut data = [0xff; 4];
        chip.read(EVENT_PORT, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn only_the_documented_writes_end_the_guest() {
        assert_eq!(end_of(0x501, &[0x31]), Some(GuestEnd::PowerOff));
        assert_eq!(end_of(0x501, &[0x32]), Some(GuestEnd::Panic));
        assert_eq!(end_of(0x505, &[1]), Some(GuestEnd::Panic));
        assert_eq!(end_of(0x604, &[0x00, 0x20]), Some(GuestEnd::PowerOff));
        assert_eq!(end_of(0x608, &[0x34]), Some(GuestEnd::PowerOff));
        assert_eq!(end_of(0x60a, &[1]), Some(GuestEnd::Reset));
        assert_eq!(end_of(0x64, &[0xfe]), Some(GuestEnd::Reset));
        for (port, data) in [
            (0x501, &[0u8][..]),
            (0x501, &[0x31, 0]),
            (0x505, &[2]),
            (0x604, &[0, 0x10]),
            (0x608, &[0x14]),
            (0x608, &[0x20]),
            (0x60a, &[0]),
            (0x64, &[0]),
            (0x60, &[0xfe]),
        ] {
            assert_eq!(end_of(port, data), None, "{port:#x} {data:x?}");
        }
    }

    #[test]
    fn an_event_interrupts_once_and_is_gone_when_read() {
        let (mut chip, event) = chip();
        assert_eq!(events(&mut chip), 0);
        chip.press_power_button().unwrap();
        assert_eq!(event.read().unwrap(), 1);
        // A read of another width sees nothing and clears nothing.
        let mut half = [0xff; 2];
        chip.read(EVENT_PORT, &mut half);
        assert_eq!(half, [0xff; 2]);
        assert_eq!(events(&mut chip), EVENT_POWER_BUTTON);
        assert_eq!(events(&mut chip), 0);
    }

    #[test]
    fn a_pending_event_survives_a_move_and_interrupts_again() {
        let (mut chip, _) = chip();
        chip.press_power_button().unwrap();
        chip.set_generation([9; 16]).unwrap();
        let (mut there, event) = self::chip();
        there.restore(&chip.save()).unwrap();
        there.resume();
        assert_eq!(event.read().unwrap(), 1);
        assert_eq!(events(&mut there), EVENT_POWER_BUTTON | EVENT_GENERATION);
        assert_eq!(there.generation(), [9; 16]);
        there.resume();
        assert!(event.read().is_err(), "nothing is pending any more");
    }

    #[test]
    fn unknown_events_are_refused() {
        let (mut chip, _event) = chip();
        let state = PlatformState { pending_events: 4, ..chip.save() };
        assert!(chip.restore(&state).is_err());
    }
}
