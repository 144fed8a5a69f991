//! Which disks the machine of a state archive has. A machine without disks has no such component, as before there were any.

use rkyv::{Archive, Deserialize, Serialize};

use crate::space::DiskSize;

/// The disks, in the order of the machine's slots: part of its shape, like [`super::ShapeState`].
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub struct DisksState {
    /// One for each disk.
    pub disks: Vec<DiskShape>,
}

/// What has to be the same of a disk.
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub struct DiskShape {
    /// Its name.
    pub name: String,
    /// Its size.
    pub size: DiskSize,
}
