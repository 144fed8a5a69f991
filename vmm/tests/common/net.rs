//! A tap in a network namespace that lives as long as the test's thread: nothing to clean up, nothing to collide with.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::process::Command;

/// Addresses of the guest and its gateway, as on a real host.
pub const GUEST_IP4: &str = "198.19.0.2";
pub const GUEST_IP6: &str = "2001:db8:6d61::2";
pub const GUEST_MAC: &str = "02:6d:61:00:00:02";
/// The guest's part of the kernel command line.
pub const CMDLINE: &str = "mashine.ip4=198.19.0.2/16 mashine.gw4=198.19.255.254 \
                           mashine.ip6=2001:db8:6d61::2/64 mashine.gw6=fe80::1 mashine.id=m-test";

const IFF_TAP: u16 = 0x0002;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;

fn ip(arguments: &str) -> bool {
    Command::new("ip").args(arguments.split(' ')).status().is_ok_and(|status| status.success())
}

/// Puts the calling thread into a network namespace of its own with a routed tap, and gives the tap. `None` where that is not
/// allowed; says so.
pub fn tap() -> Option<File> {
    // SAFETY: changes only the calling thread's network namespace.
    let done = unsafe { libc::unshare(libc::CLONE_NEWNET) };
    if done != 0 {
        super::skip("a network namespace needs root");
        return None;
    }
    let Ok(tap) = File::options().read(true).write(true).open("/dev/net/tun") else {
        super::skip("/dev/net/tun cannot be opened");
        return None;
    };
    let mut request = [0u8; 40];
    request[..4].copy_from_slice(b"tap0");
    request[16..18].copy_from_slice(&(IFF_TAP | IFF_NO_PI | IFF_VNET_HDR).to_le_bytes());
    // SAFETY: TUNSETIFF reads and writes a `struct ifreq`, which is 40 bytes.
    let made = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF, request.as_mut_ptr()) };
    assert_eq!(made, 0, "TUNSETIFF: {}", std::io::Error::last_os_error());
    let header_bytes: libc::c_int = 12;
    // SAFETY: TUNSETVNETHDRSZ reads an int.
    let set = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const header_bytes) };
    assert_eq!(set, 0);
    let steps = [
        "link set lo up".to_owned(),
        "link set tap0 address 02:6d:61:73:68:01".to_owned(),
        "link set tap0 up".to_owned(),
        "addr add 198.19.255.254/32 dev tap0".to_owned(),
        format!("route add {GUEST_IP4}/32 dev tap0"),
        "-6 addr add fe80::1/64 dev tap0 nodad".to_owned(),
        "-6 addr add 2001:db8:ffff::1/128 dev tap0 nodad".to_owned(),
        format!("-6 route add {GUEST_IP6}/128 dev tap0"),
        format!("neigh replace {GUEST_IP4} lladdr {GUEST_MAC} dev tap0 nud permanent"),
        format!("-6 neigh replace {GUEST_IP6} lladdr {GUEST_MAC} dev tap0 nud permanent"),
    ];
    for step in &steps {
        assert!(ip(step), "ip {step}");
    }
    Some(tap)
}
