//! Archives of everything a guest can observe besides its RAM: vCPUs, chips, clock, devices.
//!
//! An archive is a list of components. Each is a versioned rkyv archive of its own, found by name and index, so that a
//! newer release can convert an older component, and an older release refuses a newer one **by name** instead of
//! misreading it. What the reader does not know it refuses as well: state that is dropped silently is a guest that
//! misbehaves later.
//!
//! ```text
//!  frame(State) { machine, components: [ {"shape",0,v1,bytes} {"vcpu",0,v1,bytes} {"vcpu",1,v1,bytes} {"net",0,v1,bytes} ... ] }
//! ```
//!
//! An archive comes from another host, so all of it is validated: the frame by its checksum and caps, each component
//! by rkyv's checked access. Whether values make sense for the VM at hand is for the VMM to say. Any error leaves the
//! VM that was to be restored unusable, and the source still holds the guest.

mod chips;
mod device;
mod platform;
mod shape;
mod vcpu;

pub use chips::{ClockState, IrqchipState, PitState};
pub use device::{
    BlkState, NetState, QueueState, RngState, SerialState, TransportState, VirtioState, VsockState,
};
pub use platform::PlatformState;
pub use shape::ShapeState;
pub use vcpu::{CpuidEntry, MsrEntry, VcpuState};

use rkyv::api::high::{HighDeserializer, HighSerializer, HighValidator};
use rkyv::bytecheck::CheckBytes;
use rkyv::rancor;
use rkyv::ser::allocator::ArenaHandle;
use rkyv::util::AlignedVec;
use rkyv::{Archive, Deserialize, Serialize};

use crate::frame::{self, Kind, Message};
use crate::ids::MachineId;

/// Version of the container; components have versions of their own.
/// * 1: first.
pub const VERSION: u16 = 1;

/// Most components in one archive: 64 vCPUs and their devices several times over.
pub const COMPONENTS_MAX: usize = 512;

/// The container as it travels.
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub struct StateArchive {
    machine: MachineId,
    components: Vec<Blob>,
}

/// One component, archived: what a thread that saves its part hands to the one that puts the parts together.
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub struct Blob {
    name: String,
    index: u32,
    version: u16,
    bytes: Vec<u8>,
}

impl Message for StateArchive {
    const KIND: Kind = Kind::State;
}

/// A type that is the state of one component.
pub trait Component:
    Archive<
        Archived: for<'a> CheckBytes<HighValidator<'a, rancor::Error>>
                      + Deserialize<Self, HighDeserializer<rancor::Error>>,
    > + for<'a> Serialize<HighSerializer<AlignedVec, ArenaHandle<'a>, rancor::Error>>
    + Sized
{
    /// Its name in the archive and in errors. Part of the format.
    const NAME: &'static str;
    /// Version of its layout, raised with every change.
    const VERSION: u16;
}

macro_rules! component {
    ($($ty:ty => $name:literal, $version:literal);+ $(;)?) => {
        $(impl $crate::state::Component for $ty {
            const NAME: &'static str = $name;
            const VERSION: u16 = $version;
        })+
    };
}
component! {
    ShapeState => "shape", 1;
    VcpuState => "vcpu", 1;
    IrqchipState => "irqchip", 1;
    PitState => "pit", 1;
    ClockState => "clock", 1;
    SerialState => "serial", 1;
    NetState => "net", 1;
    RngState => "rng", 1;
    BlkState => "blk", 1;
    VsockState => "vsock", 1;
    PlatformState => "platform", 1;
}

/// Why an archive cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The envelope is broken.
    #[error("the state archive is damaged")]
    Frame(#[from] frame::FrameError),
    /// The archive does not fit a frame.
    #[error("the state cannot be archived")]
    Encode(#[from] frame::EncodeError),
    /// A component could not be archived.
    #[error("the state of `{name}` cannot be archived")]
    Archive {
        /// The component.
        name: &'static str,
        /// rkyv's reason.
        #[source]
        source: rancor::Error,
    },
    /// The container is of a release that writes another layout.
    #[error("state archive of version {got}; this release reads version {VERSION}")]
    Container {
        /// The version found.
        got: u16,
    },
    /// More components than any machine has.
    #[error("{0} components in a state archive; at most {COMPONENTS_MAX} are allowed")]
    TooMany(usize),
    /// A component is not there.
    #[error("the state archive has no `{name}` number {index}")]
    Missing {
        /// The component.
        name: &'static str,
        /// Which of them.
        index: u32,
    },
    /// A component in a version that this release does not read.
    #[error("`{name}` has version {got}; this release reads version {want}")]
    Version {
        /// The component.
        name: &'static str,
        /// The version found.
        got: u16,
        /// The version that can be read.
        want: u16,
    },
    /// A component's bytes are not a valid archive of it.
    #[error("the state of `{name}` number {index} is damaged")]
    Damaged {
        /// The component.
        name: &'static str,
        /// Which of them.
        index: u32,
        /// rkyv's reason.
        #[source]
        source: rancor::Error,
    },
    /// A component that this release does not know, or that this machine does not have.
    #[error("the state archive holds `{name}` number {index}, which this machine does not have")]
    Unexpected {
        /// The component.
        name: String,
        /// Which of them.
        index: u32,
    },
}

impl Blob {
    /// Archives `component` as number `index` of its kind.
    ///
    /// # Errors
    /// [`StateError::Archive`] when it cannot be archived.
    pub fn new<C: Component>(index: u32, component: &C) -> Result<Self, StateError> {
        let bytes = rkyv::to_bytes::<rancor::Error>(component)
            .map_err(|source| StateError::Archive { name: C::NAME, source })?;
        Ok(Self { name: C::NAME.to_owned(), index, version: C::VERSION, bytes: bytes.to_vec() })
    }
}

impl StateArchive {
    /// An archive without components.
    pub const fn new(machine: MachineId) -> Self {
        Self { machine, components: Vec::new() }
    }

    /// Whose state it is.
    pub const fn machine(&self) -> MachineId {
        self.machine
    }

    /// Adds a component as number `index` of its kind.
    ///
    /// # Errors
    /// [`StateError::Archive`] when it cannot be archived.
    pub fn add<C: Component>(&mut self, index: u32, component: &C) -> Result<(), StateError> {
        self.push(Blob::new(index, component)?);
        Ok(())
    }

    /// Adds a component that is archived already.
    pub fn push(&mut self, blob: Blob) {
        self.components.push(blob);
    }

    /// Puts the archive into its frame.
    ///
    /// # Errors
    /// [`StateError::Encode`] when it is larger than a frame may be.
    pub fn encode(&self) -> Result<Vec<u8>, StateError> {
        Ok(frame::encode(VERSION, self, 0)?.to_vec())
    }

    /// Reads an archive back. Components are validated when they are taken.
    ///
    /// # Errors
    /// [`StateError::Frame`], [`StateError::Container`], [`StateError::TooMany`].
    pub fn decode(bytes: &[u8]) -> Result<Self, StateError> {
        let (version, archive) = frame::decode_whole::<Self>(bytes)?;
        if version != VERSION {
            return Err(StateError::Container { got: version });
        }
        if archive.components.len() > COMPONENTS_MAX {
            return Err(StateError::TooMany(archive.components.len()));
        }
        Ok(archive)
    }

    /// Takes number `index` of a component out of the archive.
    ///
    /// # Errors
    /// [`StateError::Missing`], [`StateError::Version`], [`StateError::Damaged`].
    pub fn take<C: Component>(&mut self, index: u32) -> Result<C, StateError> {
        let at = self
            .components
            .iter()
            .position(|blob| blob.name == C::NAME && blob.index == index)
            .ok_or(StateError::Missing { name: C::NAME, index })?;
        let blob = self.components.swap_remove(at);
        if blob.version != C::VERSION {
            return Err(StateError::Version { name: C::NAME, got: blob.version, want: C::VERSION });
        }
        let mut aligned = AlignedVec::<16>::with_capacity(blob.bytes.len());
        aligned.extend_from_slice(&blob.bytes);
        rkyv::from_bytes::<C, rancor::Error>(&aligned).map_err(|source| StateError::Damaged {
            name: C::NAME,
            index,
            source,
        })
    }

    /// Takes a component that an older release has not written: `None` if it is not there.
    ///
    /// # Errors
    /// [`StateError::Version`], [`StateError::Damaged`].
    pub fn take_if_there<C: Component>(&mut self, index: u32) -> Result<Option<C>, StateError> {
        match self.take(index) {
            Err(StateError::Missing { .. }) => Ok(None),
            taken => taken.map(Some),
        }
    }

    /// Says that the reader has taken all it knows.
    ///
    /// # Errors
    /// [`StateError::Unexpected`] when a component is left over.
    pub fn finish(self) -> Result<(), StateError> {
        match self.components.into_iter().next() {
            None => Ok(()),
            Some(blob) => Err(StateError::Unexpected { name: blob.name, index: blob.index }),
        }
    }
}

#[cfg(test)]
mod tests;
