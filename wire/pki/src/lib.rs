//! Who is who in a fleet: one certificate authority, one identity per process that speaks on the
//! network, and the TLS configurations that follow from them.
//!
//! Every connection between hosts, the control plane and clients is mutually authenticated TLS 1.3,
//! and the fleet's own authority is the only root either side trusts: the system's root store is
//! never read. An identity is one DNS name in the certificate's subject alternative names,
//! `<name>.<kind>.mashines`, so that ordinary TLS name checking proves both *who* the peer is and
//! *what* it is; [`PeerIdentity`] is that name, parsed.
//!
//! This crate stands at the ground, beside `wire`, because data plane, control plane and tools all
//! need it and may not import each other. It does no network I/O and knows no QUIC library; the
//! `rustls` configurations it returns are what both `quinn` and `quinn-proto` are built from.
//!
//! When something fails, the error names the file and what is wrong with it ([`PkiError`]). There is
//! no revocation list yet: taking a host out of the fleet for good means a new authority.

mod authority;
mod error;
mod files;
mod identity;
mod peer;
mod tls;

pub use authority::{CA_CERT_FILE, CA_KEY_FILE, FleetCa};
pub use error::PkiError;
pub use identity::{CERT_FILE, Identity, KEY_FILE};
pub use peer::{Kind, PeerIdentity};
pub use tls::{ALPN_CONTROL, ALPN_DATA, Trust};
