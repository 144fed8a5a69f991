//! The disks of machines on this host: one overlay file each, below a directory of the machine's own.
//!
//! A disk that is being received has another name until the machine runs here, so that what a broken migration left is never
//! taken for a disk.

use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use wire::disk::OverlayLayout;
use wire::fleet::{DiskStart, RefusalCode};
use wire::ids::{Digest, MachineId};
use wire::vmm::MachineSpec;

use super::Host;
use super::commands::Refusal;
use crate::memory::DiskOverlay;

/// Suffix of a disk that is being received.
pub(super) const INCOMING: &str = "incoming";
/// Suffix of a disk of a machine that ran here last.
pub(super) const OWNED: &str = "overlay";

impl Host {
    /// The overlays of a machine, over bases that are fetched if need be.
    pub(super) async fn open_disks(
        self: &Rc<Self>,
        spec: &MachineSpec,
        start: DiskStart,
        suffix: &str,
    ) -> Result<Vec<DiskOverlay>, Refusal> {
        if start == DiskStart::Fresh {
            self.remove_disks(spec.id);
        }
        let dir = self.disks_of(spec.id);
        let mut disks = Vec::with_capacity(spec.disks.len());
        for disk in &spec.disks {
            let base = match disk.base {
                Some(digest) => Some(self.open_blob(digest).await?),
                None => None,
            };
            let path = dir.join(disk.name.as_str()).with_extension(suffix);
            let (layout, digest) = (OverlayLayout::new(disk.size), disk.base);
            let opened = tokio::task::spawn_blocking(move || {
                open_one(&path, layout, digest, base, start).map_err(|error| refusal(&path, start, &error))
            });
            disks.push(opened.await.map_err(Refusal::host)??);
        }
        Ok(disks)
    }

    /// The machine runs here: its disks are this host's.
    pub(super) fn own_disks(&self, spec: &MachineSpec) {
        let dir = self.disks_of(spec.id);
        for disk in &spec.disks {
            let path = dir.join(disk.name.as_str());
            match std::fs::rename(path.with_extension(INCOMING), path.with_extension(OWNED)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    tracing::warn!(disk = %path.display(), %error, "cannot rename a disk that has arrived");
                }
                _ => {}
            }
        }
    }

    /// Removes what this host has of a machine's disks. Processes that have them open keep what they have.
    pub(super) fn remove_disks(&self, machine: MachineId) {
        let dir = self.disks_of(machine);
        if let Err(error) = std::fs::remove_dir_all(&dir)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(dir = %dir.display(), %error, "cannot remove a machine's disks");
        }
    }

    fn disks_of(&self, machine: MachineId) -> PathBuf {
        let dir = self.config.disks.clone().unwrap_or_else(|| self.config.state.join("disks"));
        dir.join(machine.to_string())
    }
}

fn open_one(
    path: &Path,
    layout: OverlayLayout,
    digest: Option<Digest>,
    base: Option<std::fs::File>,
    start: DiskStart,
) -> io::Result<DiskOverlay> {
    if let Some(base) = &base
        && base.metadata()?.len() > layout.size().bytes()
    {
        return Err(io::Error::other("the image is larger than the disk over it"));
    }
    match start {
        DiskStart::Kept => DiskOverlay::open(path, layout, digest, base),
        DiskStart::Fresh => {
            if let Some(dir) = path.parent() {
                std::fs::create_dir_all(dir)?;
            }
            DiskOverlay::create(path, layout, digest, base)
        }
    }
}

fn refusal(path: &Path, start: DiskStart, error: &io::Error) -> Refusal {
    let what = match start {
        DiskStart::Kept => "open the disk that an earlier run left in",
        DiskStart::Fresh => "make the disk",
    };
    Refusal::new(RefusalCode::NoDisk, format!("cannot {what} {}: {error}", path.display()))
}
