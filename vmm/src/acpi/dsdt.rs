//! The devices, as AML: serial port, power button, event device, generation id, panic port, virtio transports.

use acpi_tables::Aml;
use acpi_tables::aml::{
    And, Device, EISAName, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, IO, If,
    Interrupt, Local, Memory32Fixed, Method, Name, Notify, OpRegion, OpRegionSpace, Package, Path,
    ResourceTemplate, Scope, Store,
};
use acpi_tables::sdt::Sdt;

use super::{GENERATION_PAGE, MmioDevice, OEM, OEM_REVISION, OEM_TABLE};
use crate::{platform, serial};

const HEADER_BYTES: u32 = 36;
/// Integers have 64 bits from this revision on.
const REVISION: u8 = 2;

/// The table.
pub fn table(devices: &[MmioDevice]) -> Sdt {
    let mut aml = Vec::new();
    serial_port(&mut aml);
    power_button(&mut aml);
    generation_id(&mut aml);
    event_device(&mut aml);
    panic_port(&mut aml);
    for (slot, device) in (0u8..).zip(devices) {
        virtio(&mut aml, slot, device);
    }
    let soft_off = platform::SLEEP_TYPE_OFF;
    let mut table = Sdt::new(*b"DSDT", HEADER_BYTES, REVISION, OEM, OEM_TABLE, OEM_REVISION);
    table.append_slice(&Scope::raw(Path::new("_SB_"), aml));
    let mut states = Vec::new();
    Name::new("_S5_".into(), &Package::new(vec![&soft_off])).to_aml_bytes(&mut states);
    table.append_slice(&states);
    table.update_checksum();
    table
}

fn edge(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}

fn ports(first: u16, count: u8) -> IO {
    IO::new(first, first, 1, count)
}

fn serial_port(aml: &mut Vec<u8>) {
    let (io, interrupt) = (ports(serial::PORT, 8), edge(serial::GSI));
    Device::new(
        "COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &0u8),
            &Name::new("_DDN".into(), &"COM1"),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&io, &interrupt])),
        ],
    )
    .to_aml_bytes(aml);
}

fn power_button(aml: &mut Vec<u8>) {
    Device::new(
        "PWRB".into(),
        vec![&Name::new("_HID".into(), &EISAName::new("PNP0C0C")), &Name::new("_UID".into(), &0u8)],
    )
    .to_aml_bytes(aml);
}

/// The address of the generation id is a package of its lower and upper half.
fn generation_id(aml: &mut Vec<u8>) {
    let address = u32::try_from(GENERATION_PAGE).unwrap_or(0);
    Device::new(
        "VGEN".into(),
        vec![
            &Name::new("_HID".into(), &"MASH0001"),
            &Name::new("_CID".into(), &"VM_Gen_Counter"),
            &Name::new("_DDN".into(), &"VM_Gen_Counter"),
            &Name::new("_UID".into(), &0u8),
            &Name::new("ADDR".into(), &Package::new(vec![&address, &0u8])),
        ],
    )
    .to_aml_bytes(aml);
}

/// Its interrupt makes the guest read the pending events, which clears them, and notify whom they concern.
fn event_device(aml: &mut Vec<u8>) {
    let pending = Local(0);
    let bit = Local(1);
    let events = Path::new("EVTS");
    let (button, generation) = (Path::new("\\_SB_.PWRB"), Path::new("\\_SB_.VGEN"));
    let (button_bit, generation_bit) = (platform::EVENT_POWER_BUTTON, platform::EVENT_GENERATION);
    const PRESSED_OR_CHANGED: u8 = 0x80;
    Device::new(
        "GED_".into(),
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_UID".into(), &0u8),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&edge(platform::GSI)])),
            &OpRegion::new("EREG".into(), OpRegionSpace::SystemIO, &platform::EVENT_PORT, &4u8),
            &Field::new(
                "EREG".into(),
                FieldAccessType::DWord,
                FieldLockRule::NoLock,
                FieldUpdateRule::WriteAsZeroes,
                vec![FieldEntry::Named(*b"EVTS", 32)],
            ),
            &Method::new(
                "_EVT".into(),
                1,
                true,
                vec![
                    &Store::new(&pending, &events),
                    &And::new(&bit, &pending, &button_bit),
                    &If::new(&bit, vec![&Notify::new(&button, &PRESSED_OR_CHANGED)]),
                    &And::new(&bit, &pending, &generation_bit),
                    &If::new(&bit, vec![&Notify::new(&generation, &PRESSED_OR_CHANGED)]),
                ],
            ),
        ],
    )
    .to_aml_bytes(aml);
}

fn panic_port(aml: &mut Vec<u8>) {
    const PRESENT: u8 = 0xf;
    Device::new(
        "PEVT".into(),
        vec![
            &Name::new("_HID".into(), &"QEMU0001"),
            &Name::new("_UID".into(), &0u8),
            &Name::new("_STA".into(), &PRESENT),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ports(platform::PANIC_PORT, 1)])),
        ],
    )
    .to_aml_bytes(aml);
}

fn virtio(aml: &mut Vec<u8>, slot: u8, device: &MmioDevice) {
    let registers = Memory32Fixed::new(true, device.base, device.bytes);
    Device::new(
        Path::new(&format!("VR{slot:02X}")),
        vec![
            &Name::new("_HID".into(), &"LNRO0005"),
            &Name::new("_UID".into(), &slot),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&registers, &edge(device.gsi)])),
        ],
    )
    .to_aml_bytes(aml);
}
