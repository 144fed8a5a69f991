//! The first serial port: a 16550 at 0x3f8 on IRQ 4, whose output goes to the console ring.
//!
//! The chip is vm-superio's. Its receive buffer holds 64 bytes; input beyond that waits in a bounded backlog and moves up as the
//! guest reads. Input beyond the backlog is refused, so that a guest that does not read costs nothing.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial, SerialState as ChipState};
use vmm_sys_util::eventfd::EventFd;
use wire::state::SerialState;

use crate::console::ConsoleRing;

/// First of its eight ports.
pub const PORT: u16 = 0x3f8;
/// Number of ports.
pub const PORTS: u16 = 8;
/// Its interrupt.
pub const GSI: u32 = 4;
/// Most input that may wait, in bytes.
pub const BACKLOG_BYTES_MAX: usize = 64 << 10;

/// An interrupt line wired to KVM by an irqfd.
#[derive(Debug, Clone)]
pub struct IrqLine(Arc<EventFd>);

impl IrqLine {
    /// A line that `event` raises.
    pub fn new(event: EventFd) -> Self {
        Self(Arc::new(event))
    }
}

impl Trigger for IrqLine {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// The ring, shared by a chip and the one that replaces it on a restore.
#[derive(Debug, Clone)]
struct Output(Arc<Mutex<ConsoleRing>>);

impl Output {
    fn lock(&self) -> MutexGuard<'_, ConsoleRing> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.lock().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The port.
#[derive(Debug)]
pub struct SerialPort {
    chip: Serial<IrqLine, NoEvents, Output>,
    line: IrqLine,
    backlog: VecDeque<u8>,
}

/// Input that does not fit.
#[derive(Debug, thiserror::Error)]
#[error("the guest has not read {BACKLOG_BYTES_MAX} bytes of serial input; try again later")]
pub struct BacklogFull;

impl SerialPort {
    /// A port as after power-on.
    pub fn new(line: IrqLine, console: ConsoleRing) -> Self {
        let out = Output(Arc::new(Mutex::new(console)));
        Self { chip: Serial::new(line.clone(), out), line, backlog: VecDeque::new() }
    }

    /// The guest writes a register.
    pub fn write(&mut self, offset: u8, value: u8) {
        // Errors are the interrupt's or the ring's, and neither of them fails.
        let _unlikely = self.chip.write(offset, value);
    }

    /// The guest reads a register.
    pub fn read(&mut self, offset: u8) -> u8 {
        let value = self.chip.read(offset);
        if offset == 0 && !self.backlog.is_empty() {
            self.refill();
        }
        value
    }

    /// Input for the guest.
    ///
    /// # Errors
    /// [`BacklogFull`] when it does not fit; nothing of it is taken then.
    pub fn input(&mut self, bytes: &[u8]) -> Result<(), BacklogFull> {
        if self.backlog.len() + bytes.len() > BACKLOG_BYTES_MAX {
            return Err(BacklogFull);
        }
        self.backlog.extend(bytes);
        self.refill();
        Ok(())
    }

    fn refill(&mut self) {
        let count = self.chip.fifo_capacity().min(self.backlog.len());
        let next: Vec<u8> = self.backlog.range(..count).copied().collect();
        if let Ok(taken) = self.chip.enqueue_raw_bytes(&next) {
            self.backlog.drain(..taken);
        }
    }

    /// The console ring's end.
    pub fn console(&self) -> MutexGuard<'_, ConsoleRing> {
        self.chip.writer().lock()
    }

    /// Its state.
    pub fn save(&self) -> SerialState {
        let chip = self.chip.state();
        SerialState {
            baud_divisor_low: chip.baud_divisor_low,
            baud_divisor_high: chip.baud_divisor_high,
            interrupt_enable: chip.interrupt_enable,
            interrupt_identification: chip.interrupt_identification,
            line_control: chip.line_control,
            line_status: chip.line_status,
            modem_control: chip.modem_control,
            modem_status: chip.modem_status,
            scratch: chip.scratch,
            in_buffer: chip.in_buffer,
            backlog: self.backlog.iter().copied().collect(),
        }
    }

    /// Takes on a saved state. An interrupt that was pending is raised again.
    ///
    /// # Errors
    /// [`BadSerialState`] when the buffers are longer than they can be; the port is then as it was.
    pub fn restore(&mut self, state: &SerialState) -> Result<(), BadSerialState> {
        if state.backlog.len() > BACKLOG_BYTES_MAX {
            return Err(BadSerialState);
        }
        let saved = ChipState {
            baud_divisor_low: state.baud_divisor_low,
            baud_divisor_high: state.baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.in_buffer.clone(),
        };
        let line = self.line.clone();
        let out = self.chip.writer().clone();
        self.chip = Serial::from_state(&saved, line, NoEvents, out).map_err(|_| BadSerialState)?;
        self.backlog = state.backlog.iter().copied().collect();
        Ok(())
    }
}

/// A saved state that no port can have.
#[derive(Debug, thiserror::Error)]
#[error("the serial port's state holds more input than it can")]
pub struct BadSerialState;

#[cfg(test)]
mod tests {
    use super::*;
    use wire::vmm::CONSOLE_MEMFD_BYTES;

    fn parts() -> (IrqLine, ConsoleRing) {
        let file = tempfile::tempfile().unwrap();
        file.set_len(CONSOLE_MEMFD_BYTES).unwrap();
        (IrqLine::new(EventFd::new(libc::EFD_NONBLOCK).unwrap()), ConsoleRing::new(&file).unwrap())
    }

    #[test]
    fn input_beyond_the_chip_waits_and_arrives_in_order() {
        let (line, console) = parts();
        let mut port = SerialPort::new(line, console);
        let input: Vec<u8> = (0..200).collect();
        port.input(&input).unwrap();
        let saved = port.save();
        let (line, console) = parts();
        let mut port = SerialPort::new(line, console);
        port.restore(&saved).unwrap();
        let got: Vec<u8> = (0..200).map(|_| port.read(0)).collect();
        assert_eq!(got, input);
        assert_eq!(port.read(5) & 1, 0, "nothing more to read");
    }

    #[test]
    fn too_much_input_is_refused_whole() {
        let (line, console) = parts();
        let mut port = SerialPort::new(line, console);
        assert!(port.input(&vec![0; BACKLOG_BYTES_MAX + 1]).is_err());
        assert!(port.save().in_buffer.is_empty());
        port.write(0, b'x');
        assert_eq!(port.console().offset(), 1);
    }

    #[test]
    fn an_impossible_state_is_refused() {
        let (line, console) = parts();
        let mut port = SerialPort::new(line, console);
        let mut state = port.save();
        state.in_buffer = vec![0; 65];
        assert!(port.restore(&state).is_err());
    }
}
