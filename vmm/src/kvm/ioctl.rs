//! The few ioctls that kvm-ioctls does not wrap: clearing the dirty log, and attributes of a vCPU.

use kvm_bindings::{
    KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1,
    kvm_device_attr, kvm_dirty_log, kvm_dirty_log__bindgen_ty_1,
};
use kvm_ioctls::{VcpuFd, VmFd};
use vmm_sys_util::errno;
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};
/// Request numbers. The macros make functions that cannot be documented one by one.
#[allow(missing_docs)]
mod number {
    use super::{KVMIO, kvm_clear_dirty_log, kvm_device_attr, kvm_dirty_log};
    use vmm_sys_util::{ioctl_iow_nr, ioctl_iowr_nr};

    ioctl_iow_nr!(KVM_GET_DIRTY_LOG, KVMIO, 0x42, kvm_dirty_log);
    ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);
    ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
    ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);
}
use number::{KVM_CLEAR_DIRTY_LOG, KVM_GET_DEVICE_ATTR, KVM_GET_DIRTY_LOG, KVM_SET_DEVICE_ATTR};

/// Reads the dirty log of `slot`, which has `pages` pages, into `words`. (kvm-ioctls does it too, but into new memory each time, whose
/// page faults would be part of the pause.)
///
/// # Errors
/// The kernel's, or `EINVAL` when `words` is too short.
pub fn dirty_log(vm: &VmFd, slot: u32, pages: u64, words: &mut [u64]) -> Result<(), errno::Error> {
    if u64::try_from(words.len()).unwrap_or(0) < pages.div_ceil(64) {
        return Err(errno::Error::new(libc::EINVAL));
    }
    let bitmap = kvm_dirty_log__bindgen_ty_1 { dirty_bitmap: words.as_mut_ptr().cast() };
    let log = kvm_dirty_log { slot, padding1: 0, __bindgen_anon_1: bitmap };
    // SAFETY: the kernel writes one bit for each page of the slot to `words`, which holds as many (checked above).
    let done = unsafe { ioctl_with_ref(vm, KVM_GET_DIRTY_LOG(), &log) };
    if done < 0 { Err(errno::Error::last()) } else { Ok(()) }
}

/// Clears the bits of `words` in the dirty log of `slot`, from page `first_page` of the slot on, and write-protects those
/// pages again. `pages` is a multiple of 64 or reaches the end of the slot; `words` holds a bit for each.
///
/// # Errors
/// The kernel's, or `EINVAL` when `words` is too short.
pub fn clear_dirty_log(
    vm: &VmFd,
    slot: u32,
    first_page: u64,
    pages: u32,
    words: &mut [u64],
) -> Result<(), errno::Error> {
    if u64::try_from(words.len()).unwrap_or(0) < u64::from(pages).div_ceil(64) {
        return Err(errno::Error::new(libc::EINVAL));
    }
    let bitmap = kvm_clear_dirty_log__bindgen_ty_1 { dirty_bitmap: words.as_mut_ptr().cast() };
    let mut log = kvm_clear_dirty_log { slot, num_pages: pages, first_page, __bindgen_anon_1: bitmap };
    // SAFETY: `log` is what the ioctl expects, and the kernel reads one bit per page from `words`, which holds as many (checked above).
    let done = unsafe { ioctl_with_mut_ref(vm, KVM_CLEAR_DIRTY_LOG(), &mut log) };
    if done < 0 { Err(errno::Error::last()) } else { Ok(()) }
}

fn tsc_offset_attr(value: &mut u64) -> kvm_device_attr {
    kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr: std::ptr::from_mut(value) as u64,
        flags: 0,
    }
}

/// Guest TSC minus host TSC, modulo 2^64; `None` when this KVM cannot say.
pub fn tsc_offset(vcpu: &VcpuFd) -> Option<u64> {
    let mut value = 0;
    let attr = tsc_offset_attr(&mut value);
    // SAFETY: the kernel writes one u64 to `attr.addr`, which is `value`.
    let done = unsafe { ioctl_with_ref(vcpu, KVM_GET_DEVICE_ATTR(), &attr) };
    (done == 0).then_some(value)
}

/// Sets what [`tsc_offset`] reads.
///
/// # Errors
/// The kernel's; `ENXIO` when this KVM has no such attribute.
pub fn set_tsc_offset(vcpu: &VcpuFd, mut value: u64) -> Result<(), errno::Error> {
    let attr = tsc_offset_attr(&mut value);
    // SAFETY: the kernel reads one u64 from `attr.addr`, which is `value`.
    let done = unsafe { ioctl_with_ref(vcpu, KVM_SET_DEVICE_ATTR(), &attr) };
    if done < 0 { Err(errno::Error::last()) } else { Ok(()) }
}
