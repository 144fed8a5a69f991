//! What this host's KVM can do. Asked once, before any ioctl that depends on it: KVMs differ, and an ioctl that is missing
//! fails in ways that look like bad arguments.

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_CAP_NESTED_STATE, KVM_CAP_VCPU_ATTRIBUTES, KVM_CAP_XSAVE2,
    KVM_CLOCK_HOST_TSC, KVM_CLOCK_REALTIME, KVM_DIRTY_LOG_INITIALLY_SET,
};
use kvm_ioctls::{Cap, Kvm, VmFd};

/// API version that KVM has had since 2007.
const API_VERSION: i32 = 12;

/// Why this host's KVM cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CapsError {
    /// Not the API we know.
    #[error("/dev/kvm speaks API version {0}, not 12: update the host's kernel")]
    Api(i32),
    /// A capability without which nothing works.
    #[error(
        "this host's KVM lacks {0}: use a host with a newer kernel, and in-kernel interrupt chips enabled"
    )]
    Missing(&'static str),
}

/// Capabilities that change what we do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caps {
    /// Flags for KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2; 0 if it is missing.
    pub manual_dirty_protect: u32,
    /// Bytes of a vCPU's XSAVE area (4096 or more).
    pub xsave_bytes: usize,
    /// Bytes of nested virtualisation state; 0 if there is none.
    pub nested_bytes: usize,
    /// Whether the guest's TSC frequency can be set.
    pub tsc_control: bool,
    /// Whether vCPUs have attributes (the TSC offset is one).
    pub vcpu_attributes: bool,
    /// Whether KVM can tell the guest that it was paused.
    pub kvmclock_ctrl: bool,
    /// Whether the clock is read together with wall clock and TSC.
    pub clock_realtime: bool,
}

const REQUIRED: [(Cap, &str); 15] = [
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Pit2, "KVM_CAP_PIT2"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
    (Cap::Xsave, "KVM_CAP_XSAVE"),
    (Cap::Xcrs, "KVM_CAP_XCRS"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
    (Cap::GetTscKhz, "KVM_CAP_GET_TSC_KHZ"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];

/// Checks that `kvm` can be used at all.
///
/// # Errors
/// [`CapsError`] with what is missing.
pub fn require(kvm: &Kvm) -> Result<(), CapsError> {
    let version = kvm.get_api_version();
    if version != API_VERSION {
        return Err(CapsError::Api(version));
    }
    match REQUIRED.iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
        None => Ok(()),
        Some((_, name)) => Err(CapsError::Missing(name)),
    }
}

impl Caps {
    /// Asks the VM.
    pub fn probe(vm: &VmFd) -> Self {
        let raw = |cap: u32| vm.check_extension_raw(cap.into());
        let flags = |cap: u32| u32::try_from(raw(cap)).unwrap_or(0);
        let bytes = |cap: u32| usize::try_from(raw(cap)).unwrap_or(0);
        let clock = u32::try_from(vm.check_extension_int(Cap::AdjustClock)).unwrap_or(0);
        let realtime = KVM_CLOCK_REALTIME | KVM_CLOCK_HOST_TSC;
        Self {
            manual_dirty_protect: flags(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2),
            xsave_bytes: bytes(KVM_CAP_XSAVE2).max(4096),
            nested_bytes: bytes(KVM_CAP_NESTED_STATE),
            tsc_control: vm.check_extension(Cap::TscControl),
            vcpu_attributes: raw(KVM_CAP_VCPU_ATTRIBUTES) > 0,
            kvmclock_ctrl: vm.check_extension(Cap::KvmclockCtrl),
            clock_realtime: clock & realtime == realtime,
        }
    }

    /// Whether the dirty log begins with all pages dirty and nothing write-protected.
    pub const fn dirty_log_initially_set(&self) -> bool {
        self.manual_dirty_protect & KVM_DIRTY_LOG_INITIALLY_SET != 0
    }
}
