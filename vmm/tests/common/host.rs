//! A host that plays `mashined`: makes memfds, starts `mashine-vmm`, speaks its protocol.

use std::fs::File;
use std::io::{IoSlice, IoSliceMut, Read, Seek, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::fs::MemfdFlags;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use vmm::shm::SharedMapping;
use wire::disk::OverlayLayout;
use wire::frame::{self, HEADER_BYTES, Header};
use wire::ids::{Digest, Epoch, MachineId};
use wire::space::{DiskSize, Place};
use wire::units::{PageIndex, RamSize};
use wire::vmm::{
    BootSpec, CONSOLE_MEMFD_BYTES, CpuProfile, DiskSpec, FileRef, FromVmm, MachineSpec, Notice, Phase, Reply,
    Request, ToVmm, VERSION,
};

/// Longest that anything may take; a test that waits longer has failed. A machine that is busy with builds needs it: what takes 4 s
/// alone was seen to take 70 s there.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A spec with `vcpus` and `ram_bytes`.
pub fn spec(vcpus: u32, ram_bytes: u64) -> MachineSpec {
    MachineSpec {
        id: MachineId::from_u64(0x1234),
        name: "test".parse().unwrap(),
        vcpus,
        ram: RamSize::from_bytes(ram_bytes).unwrap(),
        mac: [0x02, 0x6d, 0x61, 0, 0, 2],
        ip4: [198, 19, 0, 2],
        ip6: [0; 16],
        boot: BootSpec {
            kernel: FileRef::Path(String::new()),
            initrd: None,
            cmdline: String::new(),
            guest_config: Vec::new(),
        },
        cpu: CpuProfile { name: "host".to_owned(), features: Vec::new(), tsc_khz: 0 },
        disks: Vec::new(),
    }
}

pub fn memfd(name: &str, bytes: u64) -> File {
    let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, bytes).unwrap();
    fd.into()
}

/// A file with `bytes`, for kernels.
pub fn file_of(bytes: &[u8]) -> File {
    let mut file = memfd("kernel", 0);
    file.write_all(bytes).unwrap();
    file.rewind().unwrap();
    file
}

/// What a machine is made of, as `mashined` holds it.
pub struct Parts {
    pub spec: MachineSpec,
    pub ram: File,
    pub dirty: File,
    pub console: File,
    pub tap: Option<File>,
    /// Of each disk, its overlay, and its base if it has one.
    pub disks: Vec<(File, Option<File>)>,
}

impl Parts {
    pub fn new(spec: MachineSpec) -> Self {
        let (ram, dirty) =
            (memfd("ram", spec.ram.bytes()), memfd("dirty", spec.space().pages().div_ceil(64) * 8));
        let console = memfd("console", CONSOLE_MEMFD_BYTES);
        Self { spec, ram, dirty, console, tap: None, disks: Vec::new() }
    }

    /// Adds a disk over `base`, which is empty so far.
    pub fn with_disk(mut self, name: &str, bytes: u64, base: Option<(File, Digest)>) -> Self {
        let (base, digest) = base.unzip();
        let size = DiskSize::from_bytes(bytes).unwrap();
        self.spec.disks.push(DiskSpec { name: name.parse().unwrap(), size, base: digest });
        let overlay = overlay_of(size, digest);
        self.disks.push((overlay, base));
        self.dirty = memfd("dirty", self.spec.space().pages().div_ceil(64) * 8);
        self
    }

    /// The same machine for another VMM: same RAM, bitmap and tap, a console of its own.
    pub fn again(&self) -> Self {
        Self {
            spec: self.spec.clone(),
            ram: self.ram.try_clone().unwrap(),
            dirty: self.dirty.try_clone().unwrap(),
            console: memfd("console", CONSOLE_MEMFD_BYTES),
            tap: self.tap.as_ref().map(|tap| tap.try_clone().unwrap()),
            disks: self.disks.iter().map(clone_disk).collect(),
        }
    }

    /// Tap and disks, as they go with Create and come with Describe.
    pub fn files(&self) -> impl Iterator<Item = &File> {
        let disks = self.disks.iter().flat_map(|(overlay, base)| std::iter::once(overlay).chain(base));
        self.tap.iter().chain(disks)
    }

    pub fn word(&self, address: u32) -> u32 {
        let mut raw = [0; 4];
        self.ram.read_exact_at(&mut raw, address.into()).unwrap();
        u32::from_le_bytes(raw)
    }

    /// Absolute offset of the next byte of console output.
    pub fn console_offset(&self) -> u64 {
        let mut raw = [0; 8];
        self.console.read_exact_at(&mut raw, 0).unwrap();
        u64::from_le_bytes(raw)
    }

    /// Console output so far, from absolute offset `from`. Good for less than a ring.
    pub fn console_from(&self, from: u64) -> Vec<u8> {
        let mut raw = [0; 8];
        self.console.read_exact_at(&mut raw, 0).unwrap();
        let end = u64::from_le_bytes(raw);
        let mut out = vec![0; usize::try_from(end.saturating_sub(from)).unwrap()];
        self.console.read_exact_at(&mut out, 4096 + from).unwrap();
        out
    }

    /// Takes all bits of the shared bitmap, as `mashined` does: the pages that were set.
    pub fn take_bitmap(&self) -> Vec<u64> {
        let pages = self.spec.space().pages();
        let bytes = pages / 8;
        let shared = SharedMapping::new(&self.dirty, "dirty bitmap", bytes).unwrap();
        let words: Vec<u64> =
            shared.words().iter().map(|word| u64::from_le(word.swap(0, Ordering::AcqRel))).collect();
        let bit = |page: &u64| words[usize::try_from(page / 64).unwrap()] >> (page % 64) & 1 == 1;
        (0..pages).filter(bit).collect()
    }

    /// The same machine on another host: memory and overlays of its own, all zero; bases are what they are.
    pub fn elsewhere(&self) -> Self {
        let tap = self.tap.as_ref().map(|tap| tap.try_clone().unwrap());
        let disks = self.spec.disks.iter().zip(&self.disks).map(|(spec, (_, base))| {
            (overlay_of(spec.size, spec.base), base.as_ref().map(|base| base.try_clone().unwrap()))
        });
        Self { tap, disks: disks.collect(), ..Self::new(self.spec.clone()) }
    }

    /// Copies pages to the machine's memory and disks on the other host.
    pub fn copy_pages(&self, pages: &[u64], to: &Self) {
        let mut page = vec![0; 4096];
        let space = self.spec.space();
        for &number in pages {
            match space.locate(PageIndex(number)).unwrap() {
                Place::Ram(PageIndex(number)) => {
                    self.ram.read_exact_at(&mut page, number * 4096).unwrap();
                    to.ram.write_all_at(&page, number * 4096).unwrap();
                }
                Place::Disk { disk, block } => {
                    let layout = OverlayLayout::new(self.spec.disks[disk].size);
                    let (at, (from, _)) = (layout.data_start() + block * 4096, &self.disks[disk]);
                    from.read_exact_at(&mut page, at).unwrap();
                    to.disks[disk].0.write_all_at(&page, at).unwrap();
                    let bit = wire::disk::HEADER_BYTES + block / 8;
                    let mut byte = [0];
                    to.disks[disk].0.read_exact_at(&mut byte, bit).unwrap();
                    byte[0] |= 1 << (block % 8);
                    to.disks[disk].0.write_all_at(&byte, bit).unwrap();
                }
            }
        }
    }
}

const HEADER: u64 = wire::disk::HEADER_BYTES;

/// A fresh overlay.
pub fn overlay_of(size: DiskSize, base: Option<Digest>) -> File {
    let file = memfd("overlay", 0);
    lay_out(&file, size, base);
    file
}

/// Makes a fresh overlay of an empty file.
pub fn lay_out(file: &File, size: DiskSize, base: Option<Digest>) {
    let layout = OverlayLayout::new(size);
    file.set_len(layout.file_bytes()).unwrap();
    file.write_all_at(&layout.header(base), 0).unwrap();
    file.write_all_at(&vec![0; usize::try_from(layout.bitmap_bytes()).unwrap()], HEADER).unwrap();
}

fn clone_disk((overlay, base): &(File, Option<File>)) -> (File, Option<File>) {
    (overlay.try_clone().unwrap(), base.as_ref().map(|base| base.try_clone().unwrap()))
}

/// Waits until `done`; there is no event for a change of shared memory by the guest.
pub fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < PATIENCE, "timed out: {what}");
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// A running `mashine-vmm` and a connection to it.
pub struct Vmm {
    pub child: Child,
    pub path: PathBuf,
    /// Where connections to its vsock ports come in.
    pub vsock: PathBuf,
    _dir: tempfile::TempDir,
    pub connection: UnixStream,
    seq: u32,
    pub notices: Vec<Notice>,
}

impl Vmm {
    /// Starts the process and says hello.
    pub fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vmm.sock");
        let vsock = dir.path().join("vsock.sock");
        // Away from 3 and 4, so that the copies there have no close-on-exec flag.
        let high = [&path, &vsock]
            .map(|path| rustix::io::fcntl_dupfd_cloexec(UnixListener::bind(path).unwrap(), 100).unwrap());
        // Inside an emulated host the binaries are elsewhere than where they were built.
        let program = std::env::var_os("MASHINE_VMM");
        let mut command = Command::new(program.unwrap_or_else(|| env!("CARGO_BIN_EXE_mashine-vmm").into()));
        command.stdin(Stdio::null());
        let raw = high.each_ref().map(AsRawFd::as_raw_fd);
        let to_three_and_four = move || {
            for (from, to) in raw.into_iter().zip([3, 4]) {
                // SAFETY: dup2 is safe to call between fork and exec; `from` is open in the parent until then.
                let done = unsafe { libc::dup2(from, to) };
                if done < 0 {
                    return Err(std::io::Error::last_os_error());
                }
            }
            Ok(())
        };
        // SAFETY: the closure only makes an async-signal-safe call.
        unsafe { command.pre_exec(to_three_and_four) };
        let child = command.spawn().unwrap();
        let connection = UnixStream::connect(&path).unwrap();
        connection.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut vmm = Self { child, path, vsock, _dir: dir, connection, seq: 0, notices: Vec::new() };
        assert!(matches!(vmm.hello(), Reply::Hello { version: 1, phase: Phase::Empty }));
        vmm
    }

    pub fn hello(&mut self) -> Reply {
        self.ask(Request::Hello { version: 1 })
    }

    /// Makes a new connection; the old one is closed.
    pub fn reconnect(&mut self) -> Reply {
        let connection = UnixStream::connect(&self.path).unwrap();
        connection.set_read_timeout(Some(PATIENCE)).unwrap();
        self.connection = connection;
        self.hello()
    }

    pub fn ask(&mut self, request: Request) -> Reply {
        self.ask_with(request, &[]).0
    }

    /// As `ask`, but the answer has to be `Done`.
    pub fn must(&mut self, request: Request) {
        let reply = self.ask(request);
        assert_eq!(reply, Reply::Done);
    }

    pub fn ask_with(&mut self, request: Request, descriptors: &[BorrowedFd<'_>]) -> (Reply, Vec<OwnedFd>) {
        self.seq += 1;
        let bytes = frame::encode(VERSION, &ToVmm { seq: self.seq, request }, 0).unwrap();
        self.send_raw(&bytes, descriptors);
        loop {
            match self.receive().expect("the VMM closed the connection") {
                (FromVmm::Reply { seq, reply }, descriptors) => {
                    assert_eq!(seq, self.seq);
                    return (reply, descriptors);
                }
                (FromVmm::Notice(notice), _) => self.notices.push(notice),
            }
        }
    }

    pub fn send_raw(&mut self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(24))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(descriptors)));
        }
        let mut sent =
            rustix::net::sendmsg(&self.connection, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)
                .unwrap();
        while sent < bytes.len() {
            sent += self.connection.write(&bytes[sent..]).unwrap();
        }
    }

    /// The next message; `None` at end of file.
    pub fn receive(&mut self) -> Option<(FromVmm, Vec<OwnedFd>)> {
        let mut fixed = [0; HEADER_BYTES];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(24))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let got = rustix::net::recvmsg(
            &self.connection,
            &mut [IoSliceMut::new(&mut fixed)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        );
        let got = match got {
            // Closed, without or with something unread.
            Err(rustix::io::Errno::CONNRESET) => return None,
            Ok(got) if got.bytes == 0 => return None,
            got => got.expect("receive"),
        };
        let mut descriptors = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                descriptors.extend(rights);
            }
        }
        self.connection.read_exact(&mut fixed[got.bytes..]).unwrap();
        let header = Header::parse(&fixed).unwrap();
        let mut body = rkyv::util::AlignedVec::new();
        body.resize(header.body_bytes as usize, 0);
        self.connection.read_exact(&mut body).unwrap();
        Some((header.decode(&body).unwrap(), descriptors))
    }

    /// The next notice.
    pub fn notice(&mut self) -> Notice {
        if !self.notices.is_empty() {
            return self.notices.remove(0);
        }
        match self.receive() {
            Some((FromVmm::Notice(notice), _)) => notice,
            other => panic!("a notice was expected, {other:?} came"),
        }
    }

    pub fn create(&mut self, parts: &Parts) -> Reply {
        let kvm = File::options().read(true).write(true).open("/dev/kvm").unwrap();
        let files: Vec<&File> =
            [&kvm, &parts.ram, &parts.dirty, &parts.console].into_iter().chain(parts.files()).collect();
        let descriptors: Vec<_> = files.iter().map(|file| file.as_fd()).collect();
        self.ask_with(Request::Create(parts.spec.clone()), &descriptors).0
    }

    pub fn boot_files(&mut self, kernel: &File, initrd: &File, cmdline: &str) -> Reply {
        let request = Request::Boot { initrd: true, cmdline: cmdline.to_owned() };
        self.ask_with(request, &[kernel.as_fd(), initrd.as_fd()]).0
    }

    pub fn boot(&mut self, kernel: &[u8], cmdline: &str) -> Reply {
        let kernel = file_of(kernel);
        let request = Request::Boot { initrd: false, cmdline: cmdline.to_owned() };
        self.ask_with(request, &[kernel.as_fd()]).0
    }

    pub fn run(&mut self, epoch: u64) {
        self.must(Request::Run { epoch: Epoch(epoch) });
    }

    pub fn pause(&mut self, harvest: bool) -> Reply {
        let reply = self.ask(Request::Pause { harvest });
        assert!(matches!(reply, Reply::Paused { .. }), "{reply:?}");
        reply
    }

    pub fn save(&mut self) -> Vec<u8> {
        match self.ask(Request::Save) {
            Reply::State(bytes) => bytes,
            other => panic!("{other:?}"),
        }
    }

    /// Starts a VMM with a machine that runs `kernel`.
    pub fn running(parts: &Parts, kernel: &[u8]) -> Self {
        let mut vmm = Self::start();
        assert_eq!(vmm.create(parts), Reply::Done);
        assert_eq!(vmm.boot(kernel, "quiet"), Reply::Done);
        vmm.run(1);
        vmm
    }

    pub fn wait_for_exit(&mut self) -> std::process::ExitStatus {
        let begin = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(begin.elapsed() < PATIENCE, "the VMM does not end");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}
