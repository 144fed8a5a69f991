//! The ACPI tables that a booting kernel finds: what there is, where, and on which interrupt.
//!
//! ```text
//!  0xe0000 RSDP -> XSDT -> FADT -> DSDT (devices, in AML)
//!                       -> MADT (vCPUs, IOAPIC)                    0xef000 VM generation id
//! ```
//!
//! The machine is **hardware-reduced** ACPI: no PM1 blocks, no PM timer, no SCI, no PIT behind a legacy PIC. Power off and reset are one
//! register each, and all events come through one Generic Event Device, whose pending bits are the only new state a move has to carry
//! ([`crate::platform`]). A PM timer would be worse than none: Linux makes it the watchdog of the TSC, and a watchdog that stands still
//! in a pause is what declares good clocks bad.
//!
//! The tables are written once, at boot, into RAM that the memory map calls reserved; afterwards they are the guest's and move with its RAM.
//! They are made of what the machine is, never of what a guest says.

mod dsdt;

use acpi_tables::Aml;
use acpi_tables::fadt::{FADT, FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;
use vm_memory::{Bytes, GuestAddress};

use crate::memory::GuestMemory;
use crate::platform;

/// Guest-physical address of the root pointer: where a PC has it too, so that kernels that search for it find it.
pub const RSDP: u64 = 0xe_0000;
/// Guest-physical address of the page with the VM generation id.
pub const GENERATION_PAGE: u64 = 0xe_f000;
/// Where the tables begin; they end below [`GENERATION_PAGE`].
const TABLES: u64 = 0xe_0040;

const LOCAL_APIC: u32 = 0xfee0_0000;
const IOAPIC: u32 = 0xfec0_0000;
const OEM: [u8; 6] = *b"MASHIN";
const OEM_TABLE: [u8; 8] = *b"MASHINES";
const OEM_REVISION: u32 = 1;

/// FADT, IA-PC boot architecture: there is a serial port, but neither keyboard controller nor VGA or clock chip (CMOS).
const BOOT_ARCHITECTURE: u16 = 1 | 1 << 2 | 1 << 5;

/// A device behind a virtio-mmio transport.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MmioDevice {
    /// Guest-physical address of its registers.
    pub base: u32,
    /// Length of its registers.
    pub bytes: u32,
    /// Its interrupt; edges.
    pub gsi: u32,
}

/// Tables that do not fit where they belong: more devices than a machine can have.
#[derive(Debug, thiserror::Error)]
pub enum AcpiError {
    /// Too long.
    #[error("the ACPI tables have {0} bytes, more than there is room for")]
    TooLong(usize),
    /// Guest memory refused a write.
    #[error("the ACPI tables cannot be written")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// Writes the tables of a machine with `vcpus` and `devices`.
///
/// # Errors
/// [`AcpiError`].
pub fn write(memory: &GuestMemory, vcpus: u8, devices: &[MmioDevice]) -> Result<(), AcpiError> {
    let (root, tables) = build(vcpus, devices);
    let end = TABLES + u64::try_from(tables.len()).unwrap_or(u64::MAX);
    if end > GENERATION_PAGE {
        return Err(AcpiError::TooLong(tables.len()));
    }
    memory.write_slice(&root, GuestAddress(RSDP))?;
    Ok(memory.write_slice(&tables, GuestAddress(TABLES))?)
}

/// The root pointer, and what lies at [`TABLES`].
fn build(vcpus: u8, devices: &[MmioDevice]) -> (Vec<u8>, Vec<u8>) {
    let mut tables = Vec::new();
    let mut place = |table: &dyn Aml| {
        // Tables begin on 16 bytes, for whoever reads a dump.
        tables.resize(tables.len().next_multiple_of(16), 0);
        let address = TABLES + u64::try_from(tables.len()).unwrap_or(u64::MAX);
        table.to_aml_bytes(&mut tables);
        address
    };
    let dsdt = place(&dsdt::table(devices));
    let fadt = place(&fadt(dsdt));
    let madt = place(&madt(vcpus));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = place(&xsdt);
    let mut root = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut root);
    (root, tables)
}

fn fadt(dsdt: u64) -> FADT {
    let register = |port: u16| GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port.into());
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Wbinvd)
        // Neither button is a fixed one: the power button is a device, and there is no other.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::Headless);
    fadt.iapc_boot_arch = BOOT_ARCHITECTURE.into();
    fadt.reset_reg = register(platform::RESET_PORT);
    fadt.reset_value = platform::RESET_VALUE;
    fadt.sleep_control_reg = register(platform::SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = register(platform::SLEEP_STATUS_PORT);
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(OEM_TABLE).into();
    fadt.finalize()
}

/// vCPU numbers are APIC ids; the IOAPIC has all interrupts, none of them overridden.
fn madt(vcpus: u8) -> MADT {
    let address = LocalInterruptController::Address(LOCAL_APIC);
    let mut madt = MADT::new(OEM, OEM_TABLE, OEM_REVISION, address);
    for id in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, IOAPIC, 0));
    madt
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEVICES: [MmioDevice; 2] = [
        MmioDevice { base: 0xd000_0000, bytes: 0x1000, gsi: 5 },
        MmioDevice { base: 0xd000_1000, bytes: 0x1000, gsi: 16 },
    ];

    fn word(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    fn long(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    /// The table at a guest-physical address; its length and checksum are right.
    fn table(tables: &[u8], address: u64) -> &[u8] {
        let at = usize::try_from(address - TABLES).unwrap();
        let length = usize::try_from(word(tables, at + 4)).unwrap();
        let table = &tables[at..at + length];
        assert_eq!(sum(table), 0, "{:?}", String::from_utf8_lossy(&table[..4]));
        table
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn every_table_is_reached_from_the_root_and_has_its_checksum() {
        let (root, tables) = build(3, &DEVICES);
        assert_eq!(&root[..8], b"RSD PTR ");
        assert_eq!((sum(&root[..20]), sum(&root)), (0, 0));
        let xsdt = table(&tables, long(&root, 24));
        assert_eq!((&xsdt[..4], xsdt.len()), (&b"XSDT"[..], 36 + 16));
        let fadt = table(&tables, long(xsdt, 36));
        assert_eq!((&fadt[..4], fadt.len()), (&b"FACP"[..], 276));
        assert_eq!(word(fadt, 112) & 1 << 20, 1 << 20, "hardware-reduced");
        let dsdt = table(&tables, long(fadt, 140));
        assert_eq!((&dsdt[..4], dsdt[8]), (&b"DSDT"[..], 2), "64-bit integers");
        let madt = table(&tables, long(xsdt, 44));
        assert_eq!((&madt[..4], word(madt, 36)), (&b"APIC"[..], LOCAL_APIC));
        let structures: Vec<_> = madt[44..44 + 3 * 8].chunks(8).collect();
        assert_eq!(structures, [0, 1, 2].map(|id| [0, 8, id, id, 1, 0, 0, 0]));
        assert_eq!(madt[44 + 24..], [1, 12, 0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0]);
    }

    #[test]
    fn the_tables_of_the_largest_machine_fit() {
        let device = |slot: u32| MmioDevice { base: 0xd000_0000 + slot * 4096, bytes: 4096, gsi: 5 };
        let devices: Vec<_> = (0..16).map(device).collect();
        let (_, tables) = build(255, &devices);
        assert!(TABLES + u64::try_from(tables.len()).unwrap() <= GENERATION_PAGE);
    }

    /// For a person with `iasl -d`: `MASHINE_DSDT=/tmp/dsdt.aml cargo test -p vmm dsdt_for_a_person`.
    #[test]
    fn dsdt_for_a_person() {
        if let Ok(path) = std::env::var("MASHINE_DSDT") {
            std::fs::write(path, dsdt::table(&DEVICES).as_slice()).unwrap();
        }
    }
}
