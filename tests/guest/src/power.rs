//! How the guest ends: the power-off ports, and the panic handler.

use crate::{cpu, serial};
use core::panic::PanicInfo;

/// Our VMM's exit port, and QEMU's `isa-debug-exit` if put there.
const EXIT_PORT: u16 = 0x501;
/// PM1a control of QEMU's ACPI, where there is one; bit 13 is the sleep enable.
const ACPI_PM: u16 = 0x604;
const CODE_OFF: u8 = 0x31;
const CODE_PANIC: u8 = 0x32;

/// Powers off cleanly.
pub fn off() -> ! {
    serial::line_now(format_args!("off"));
    leave(CODE_OFF)
}

fn leave(code: u8) -> ! {
    cpu::out8(EXIT_PORT, code);
    cpu::out16(ACPI_PM, 0x2000);
    cpu::halt()
}

/// Reports a fault that ends the guest.
pub fn fatal(args: core::fmt::Arguments<'_>) -> ! {
    serial::line_now(format_args!("panic: {args}"));
    leave(CODE_PANIC)
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    match info.location() {
        Some(at) => fatal(format_args!("{} at {}:{}", info.message(), at.file(), at.line())),
        None => fatal(format_args!("{}", info.message())),
    }
}
