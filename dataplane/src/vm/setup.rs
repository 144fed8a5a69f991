//! The control socket while descriptors travel on it: creating, booting, adopting. Blocking, with a limit on each answer;
//! runs on the agent's blocking threads and ends by giving the socket to the machine's home shard.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rkyv::util::AlignedVec;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use wire::disk::OverlayLayout;
use wire::frame::{self, HEADER_BYTES, Header};
use wire::vmm::{Disowned, FromVmm, GuestEnd, MachineSpec, Phase, Reply, Request, ToVmm, VERSION};

use super::{VmmError, accepted};
use crate::memory::{ConsoleRing, DirtyBitmap, DiskOverlay, GuestRam, MachineMemory};
use crate::net::Tap;
use wire::ids::Epoch;

/// Longest wait for one answer. Creating a VM takes some 10 ms; loading a kernel as long as reading it.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// Most descriptors in one message: see [`Request::Create`].
const DESCRIPTORS_MAX: usize = 5 + 2 * wire::space::DISKS_MAX;

/// A VMM found running.
#[derive(Debug)]
pub struct Adopted {
    /// What it runs.
    pub spec: MachineSpec,
    /// Where in its life it is.
    pub phase: Phase,
    /// Highest epoch it has seen.
    pub epoch: Epoch,
    /// If it was given away.
    pub disowned: Option<Disowned>,
    /// If its guest has ended.
    pub ended: Option<GuestEnd>,
    /// Its memory.
    pub memory: MachineMemory,
    /// Its tap.
    pub tap: Tap,
}

/// A connection to a VMM's control socket.
#[derive(Debug)]
pub struct Setup {
    stream: UnixStream,
    seq: u32,
}

impl Setup {
    /// Connects and agrees on a version.
    ///
    /// # Errors
    /// [`VmmError`].
    pub fn connect(socket: &Path) -> Result<Self, VmmError> {
        let gone = |source| VmmError::Gone { waiting_for: "connect", source: Some(source) };
        let stream = UnixStream::connect(socket).map_err(gone)?;
        stream.set_read_timeout(Some(ANSWER_LIMIT)).map_err(gone)?;
        stream.set_write_timeout(Some(ANSWER_LIMIT)).map_err(gone)?;
        let mut setup = Self { stream, seq: 0 };
        match setup.call("Hello", Request::Hello { version: VERSION }, &[])? {
            (Reply::Hello { version: VERSION, .. }, _) => Ok(setup),
            _ => Err(VmmError::Protocol("Hello")),
        }
    }

    /// Creates the VM over this memory and tap.
    ///
    /// # Errors
    /// [`VmmError`]; [`VmmError::File`] when `/dev/kvm` cannot be opened.
    pub fn create(&mut self, spec: &MachineSpec, memory: &MachineMemory, tap: &Tap) -> Result<(), VmmError> {
        let path = "/dev/kvm";
        let kvm = File::options().read(true).write(true).open(path);
        let kvm = kvm.map_err(|source| VmmError::File { what: "open", path: path.to_owned(), source })?;
        let mut fds =
            vec![kvm.as_fd(), memory.ram.as_fd(), memory.dirty.as_fd(), memory.console.as_fd(), tap.as_fd()];
        for disk in &memory.disks {
            fds.push(disk.as_fd());
            fds.extend(disk.base().map(AsFd::as_fd));
        }
        self.done("Create", Request::Create(spec.clone()), &fds)
    }

    /// Loads the kernel.
    ///
    /// # Errors
    /// A kernel that is none is [`VmmError::Refused`].
    pub fn boot(&mut self, kernel: File, initrd: Option<File>, cmdline: String) -> Result<(), VmmError> {
        let fds: Vec<_> = std::iter::once(&kernel).chain(&initrd).map(File::as_fd).collect();
        self.done("Boot", Request::Boot { initrd: initrd.is_some(), cmdline }, &fds)
    }

    /// Asks a running VMM for everything it holds. `None` if it has not been created yet.
    ///
    /// # Errors
    /// [`VmmError`], also when what it gives back does not fit together.
    pub fn adopt(&mut self) -> Result<Option<Adopted>, VmmError> {
        let (reply, fds) = self.call("Describe", Request::Describe, &[])?;
        let Reply::Description { spec, phase, epoch, disowned, ended, .. } = reply else {
            return Err(VmmError::Protocol("Describe"));
        };
        let Some(spec) = spec else { return Ok(None) };
        let lacking = || VmmError::Protocol("Describe without its descriptors");
        let mut fds = fds.into_iter();
        let mut next = || fds.next().ok_or_else(lacking);
        let [ram, dirty, console, tap] = [next()?, next()?, next()?, next()?];
        let mapped = |e| VmmError::File {
            what: "map",
            path: format!("the memory of {}", spec.id),
            source: io::Error::other(e),
        };
        let mut disks = Vec::new();
        for disk in &spec.disks {
            let (overlay, base) = (next()?, disk.base.map(|_| next()).transpose()?);
            let layout = OverlayLayout::new(disk.size);
            let adopted = DiskOverlay::adopt(overlay, base, layout, disk.base);
            disks.push(adopted.map_err(|source| VmmError::File {
                what: "take back",
                path: format!("disk {} of {}", disk.name, spec.id),
                source,
            })?);
        }
        let space = spec.space();
        let memory = MachineMemory {
            ram: GuestRam::adopt(ram, spec.ram).map_err(mapped)?,
            disks,
            dirty: DirtyBitmap::adopt(dirty, space.pages()).map_err(mapped)?,
            console: ConsoleRing::adopt(console).map_err(mapped)?,
            space,
        };
        Ok(Some(Adopted { spec, phase, epoch, disowned, ended, memory, tap: Tap::adopt(tap) }))
    }

    /// Gives the socket to the home shard. Nothing was received that is not read.
    pub fn into_socket(self) -> OwnedFd {
        // The limits would turn the shard's waits into errors.
        let _best_effort = self.stream.set_read_timeout(None);
        let _best_effort = self.stream.set_write_timeout(None);
        self.stream.into()
    }

    fn done(&mut self, what: &'static str, request: Request, fds: &[BorrowedFd<'_>]) -> Result<(), VmmError> {
        match self.call(what, request, fds)? {
            (Reply::Done, _) => Ok(()),
            _ => Err(VmmError::Protocol(what)),
        }
    }

    fn call(
        &mut self,
        what: &'static str,
        request: Request,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(Reply, Vec<OwnedFd>), VmmError> {
        self.seq += 1;
        let gone = |source: io::Error| match source.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => VmmError::Silent(what),
            io::ErrorKind::UnexpectedEof => VmmError::Gone { waiting_for: what, source: None },
            _ => VmmError::Gone { waiting_for: what, source: Some(source) },
        };
        let message = ToVmm { seq: self.seq, request };
        let bytes = frame::encode(VERSION, &message, 0).map_err(|_| VmmError::Protocol(what))?;
        self.send(&bytes, fds).map_err(gone)?;
        let mut received = Vec::new();
        loop {
            match self.receive(&mut received).map_err(gone)? {
                FromVmm::Reply { seq, reply } if seq == self.seq => return Ok((accepted(reply)?, received)),
                // A guest may end at any moment; Describe and the shard's client will say so again.
                FromVmm::Notice(_) => {}
                FromVmm::Reply { .. } => return Err(VmmError::Protocol(what)),
            }
        }
    }

    fn send(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let sent =
            rustix::net::sendmsg(&self.stream, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?;
        self.stream.write_all(&bytes[sent..])
    }

    fn receive(&mut self, fds: &mut Vec<OwnedFd>) -> io::Result<FromVmm> {
        let mut fixed = [0; HEADER_BYTES];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let iov = &mut [IoSliceMut::new(&mut fixed)];
        let got = rustix::net::recvmsg(&self.stream, iov, &mut control, RecvFlags::CMSG_CLOEXEC)?.bytes;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = message {
                fds.extend(received);
            }
        }
        if got == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.stream.read_exact(&mut fixed[got..])?;
        let invalid = |e| io::Error::new(io::ErrorKind::InvalidData, e);
        let header = Header::parse(&fixed).map_err(invalid)?;
        let mut body = AlignedVec::with_capacity(header.body_bytes as usize);
        body.resize(header.body_bytes as usize, 0);
        self.stream.read_exact(&mut body)?;
        header.decode(&body).map_err(invalid)
    }
}
