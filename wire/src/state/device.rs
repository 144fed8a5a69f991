//! Devices: the virtio-mmio transport with its queues, network interface, entropy source, serial port.

use rkyv::{Archive, Deserialize, Serialize};

/// One virtqueue. Addresses are guest-physical and untrusted: the guest chose them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub struct QueueState {
    /// Entries the driver chose, a power of two.
    pub size: u16,
    /// Whether the driver has made it ready.
    pub ready: bool,
    /// Descriptor table.
    pub desc_table: u64,
    /// Available ring.
    pub avail_ring: u64,
    /// Used ring.
    pub used_ring: u64,
    /// Next entry of the available ring that the device takes.
    pub next_avail: u16,
    /// Next entry of the used ring that the device writes.
    pub next_used: u16,
}

/// The registers of one virtio-mmio transport.
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub struct TransportState {
    /// Device status register.
    pub status: u32,
    /// Interrupt status register.
    pub interrupt_status: u32,
    /// Which half of the device's features the driver looks at.
    pub device_features_sel: u32,
    /// Which half of its own features the driver writes.
    pub driver_features_sel: u32,
    /// Features the driver has accepted.
    pub driver_features: u64,
    /// Which queue the queue registers mean.
    pub queue_sel: u32,
    /// Counter of configuration changes.
    pub config_generation: u32,
    /// The queues.
    pub queues: Vec<QueueState>,
}

/// What every virtio device has.
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub struct VirtioState {
    /// Its transport.
    pub transport: TransportState,
    /// Features the device offered; a target that offers fewer of the accepted ones refuses.
    pub device_features: u64,
}

/// virtio-net.
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub struct NetState {
    /// Transport and queues.
    pub virtio: VirtioState,
    /// MAC address.
    pub mac: [u8; 6],
}

/// virtio-blk. What its disk holds travels apart from it.
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub struct BlkState {
    /// Transport and queue; no request is under way.
    pub virtio: VirtioState,
}

/// virtio-vsock. Its connections do not travel: the guest is told that they were reset.
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub struct VsockState {
    /// Transport and queues.
    pub virtio: VirtioState,
}

/// virtio-rng.
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub struct RngState {
    /// Transport and queues.
    pub virtio: VirtioState,
}

/// The 16550.
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub struct SerialState {
    /// Divisor latch, low.
    pub baud_divisor_low: u8,
    /// Divisor latch, high.
    pub baud_divisor_high: u8,
    /// Interrupt enable register.
    pub interrupt_enable: u8,
    /// Interrupt identification register.
    pub interrupt_identification: u8,
    /// Line control register.
    pub line_control: u8,
    /// Line status register.
    pub line_status: u8,
    /// Modem control register.
    pub modem_control: u8,
    /// Modem status register.
    pub modem_status: u8,
    /// Scratch register.
    pub scratch: u8,
    /// Input the guest has not read yet.
    pub in_buffer: Vec<u8>,
    /// Input that waits for room in the buffer.
    pub backlog: Vec<u8>,
}
