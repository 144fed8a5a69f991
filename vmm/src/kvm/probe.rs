//! Whether this host's KVM can run an operating system: a few instructions that every kernel uses, run in ring 0 of a VM that is thrown away.
//!
//! There are KVMs without hardware virtualisation below them. They have all the ioctls and run code of ring 3 at full speed, but interpret ring 0 with
//! an emulator that does not know every instruction. What they can do is found out by doing it; no module's name and no CPU flag says it as reliably. The
//! probe takes some 10 ms, and the answer does not change while the host runs.

use std::fmt;
use std::fs::File;
use std::os::fd::{FromRawFd, IntoRawFd};
use std::os::unix::fs::FileExt;
use std::path::Path;

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit};

use super::{Attempt, KvmError};
use crate::shm::{SharedMapping, ShmError};
use crate::vcpu::{Entry, Protocol, set_boot_state};

/// What a host's KVM can do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ability {
    /// Anything: Linux runs.
    Complete,
    /// Guests that do their work in ring 3, as our test guest. Why not more, in one line.
    Ring3Only(String),
    /// Nothing: there is no usable KVM. Why, in one line.
    None(String),
}

impl Ability {
    /// Whether unmodified operating systems run.
    pub const fn is_complete(&self) -> bool {
        matches!(self, Self::Complete)
    }
}

impl fmt::Display for Ability {
    /// What `mashine-vmm --probe` prints: a word, and what is missing.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Complete => write!(f, "complete"),
            Self::Ring3Only(why) => write!(f, "ring-3-only: {why}"),
            Self::None(why) => write!(f, "none: {why}"),
        }
    }
}

/// Why the probe itself failed.
#[derive(Debug, thiserror::Error)]
enum ProbeError {
    #[error(transparent)]
    Kvm(#[from] KvmError),
    #[error("no memory for a probe")]
    Memory(#[from] std::io::Error),
    #[error(transparent)]
    Mapping(#[from] ShmError),
}

const RAM_BYTES: u64 = 4096;
const PORT: u16 = 0x80;
/// What the code gives to [`PORT`]: how many bits of 0xffff are set.
const ANSWER: u8 = 16;

/// 32-bit code at address 0.
const CODE: [u8; 21] = [
    0xb8, 0xff, 0xff, 0x00, 0x00, // mov eax, 0xffff
    0xf3, 0x0f, 0xb8, 0xf0, // popcnt esi, eax
    0xb8, 0x01, 0x00, 0x00, 0x00, // mov eax, 1
    0x0f, 0xa2, // cpuid
    0x89, 0xf0, // mov eax, esi
    0xe6, 0x80, // out 0x80, al
    0xf4, // hlt
];

/// Finds out what `/dev/kvm` can do.
pub fn probe() -> Ability {
    probe_at(Path::new("/dev/kvm"))
}

/// Finds out what the KVM behind `device` can do.
pub fn probe_at(device: &Path) -> Ability {
    let file = match File::options().read(true).write(true).open(device) {
        Ok(file) => file,
        Err(error) => return Ability::None(format!("{} cannot be opened: {error}", device.display())),
    };
    // SAFETY: the descriptor is owned and given up here; whether it is KVM shows at the first ioctl.
    let kvm = unsafe { Kvm::from_raw_fd(file.into_raw_fd()) };
    match run(&kvm) {
        Ok(None) => Ability::Complete,
        Ok(Some(why)) => Ability::Ring3Only(why),
        Err(error) => {
            let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
            Ability::None(format!("{error}: {cause}"))
        }
    }
}

/// `None` when the code ran as it should; otherwise what happened instead.
fn run(kvm: &Kvm) -> Result<Option<String>, ProbeError> {
    let vm = kvm.create_vm().attempt("creating a VM")?;
    let ram = rustix::fs::memfd_create("probe", rustix::fs::MemfdFlags::CLOEXEC);
    let ram = File::from(ram.map_err(std::io::Error::from)?);
    ram.set_len(RAM_BYTES)?;
    ram.write_all_at(&CODE, 0)?;
    let mapping = SharedMapping::new(&ram, "probe", RAM_BYTES)?;
    let region = kvm_userspace_memory_region {
        memory_size: RAM_BYTES,
        userspace_addr: mapping.as_ptr() as u64,
        ..Default::default()
    };
    // SAFETY: the mapping lives until the VM and its vCPU are gone, and Rust code does not touch it.
    unsafe { vm.set_user_memory_region(region) }.attempt("giving the VM its RAM")?;
    let mut vcpu = vm.create_vcpu(0).attempt("making a vCPU")?;
    let leaves = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).attempt("asking for CPUID")?;
    vcpu.set_cpuid2(&leaves).attempt("setting CPUID")?;
    set_boot_state(&vcpu, Entry { address: 0, parameters: 0, protocol: Protocol::Pvh })?;
    Ok(match vcpu.run() {
        Ok(VcpuExit::IoOut(PORT, [ANSWER])) => None,
        Ok(VcpuExit::InternalError) => Some("KVM cannot run popcnt in ring 0".to_owned()),
        Ok(other) => Some(format!("popcnt in ring 0 ended with {other:?}")),
        Err(error) => Some(format!("KVM_RUN failed: {error}")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_kvm_can_do_nothing() {
        for path in ["/nowhere", "/dev/null"] {
            assert!(matches!(probe_at(Path::new(path)), Ability::None(_)), "{path}");
        }
    }

    #[test]
    fn the_answer_does_not_change() {
        let answer = probe();
        assert_eq!(std::mem::discriminant(&answer), std::mem::discriminant(&probe()));
        println!("this host's KVM: {answer:?}");
    }
}
