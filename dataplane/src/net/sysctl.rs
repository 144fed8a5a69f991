//! Kernel settings of the host's network namespace, as files under `/proc/sys/net`.

use std::io;
use std::path::PathBuf;

/// A setting that could not be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot write `{value}` to {path:?}: run as root, with /proc/sys writable")]
pub struct SysctlError {
    path: PathBuf,
    value: &'static str,
    #[source]
    source: io::Error,
}

/// What routing for machines needs, for the whole namespace: forwarding; no reverse-path filter (held packets come back in
/// through another interface than they went to); no redirects (a forward route sends packets out where they came in).
const HOST: &[(&str, &str)] = &[
    ("ipv4/ip_forward", "1"),
    ("ipv6/conf/all/forwarding", "1"),
    ("ipv4/conf/all/rp_filter", "0"),
    ("ipv4/conf/default/rp_filter", "0"),
    ("ipv4/conf/all/send_redirects", "0"),
    ("ipv4/conf/default/send_redirects", "0"),
    ("ipv4/conf/all/accept_redirects", "0"),
];

/// Answering for machines on the uplink, without the random delay that proxies have by default.
const UPLINK: &[(&str, &str)] = &[
    ("ipv6/conf/{}/proxy_ndp", "1"),
    ("ipv4/neigh/{}/proxy_delay", "0"),
    ("ipv6/neigh/{}/proxy_delay", "0"),
    ("ipv4/conf/{}/rp_filter", "0"),
    ("ipv4/conf/{}/send_redirects", "0"),
];

/// A tap: no address of the kernel's own making.
const TAP: &[(&str, &str)] = &[
    ("ipv6/conf/{}/addr_gen_mode", "1"),
    ("ipv6/conf/{}/accept_ra", "0"),
    ("ipv4/conf/{}/rp_filter", "0"),
    ("ipv4/conf/{}/send_redirects", "0"),
];

/// The interface through which held packets come back in; they may carry the host's own address as their source.
const REINJECT: &[(&str, &str)] = &[
    ("ipv6/conf/{}/addr_gen_mode", "1"),
    ("ipv4/conf/{}/rp_filter", "0"),
    ("ipv4/conf/{}/accept_local", "1"),
];

pub(super) fn host() -> Result<(), SysctlError> {
    apply(HOST, "")
}

pub(super) fn uplink(name: &str) -> Result<(), SysctlError> {
    apply(UPLINK, name)
}

pub(super) fn tap(name: &str) -> Result<(), SysctlError> {
    apply(TAP, name)
}

pub(super) fn reinject(name: &str) -> Result<(), SysctlError> {
    apply(REINJECT, name)
}

fn apply(settings: &[(&'static str, &'static str)], interface: &str) -> Result<(), SysctlError> {
    for &(key, value) in settings {
        let path = PathBuf::from("/proc/sys/net").join(key.replace("{}", interface));
        std::fs::write(&path, value).map_err(|source| SysctlError { path, value, source })?;
    }
    Ok(())
}
