//! TLS configurations: 1.3 only, both sides show a certificate, the fleet's authority is the only root.

use std::path::Path;
use std::sync::Arc;

use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};

use crate::files::{self, Secrecy};
use crate::{CA_CERT_FILE, Identity, PkiError};

/// Application protocol of connections that move machines between hosts.
pub const ALPN_DATA: &[u8] = b"mashines-data/1";
/// Application protocol of connections between hosts and the control plane.
pub const ALPN_CONTROL: &[u8] = b"mashines-control/1";

/// One member's view of the fleet: whom it trusts and who it is.
///
/// ```
/// # fn main() -> Result<(), pki::PkiError> {
/// let ca = pki::FleetCa::create()?;
/// let trust = pki::Trust::new(ca.cert_pem(), &ca.issue("host-a", pki::Kind::Host)?)?;
/// let server = trust.server_config(pki::ALPN_DATA)?;
/// let client = trust.client_config(pki::ALPN_DATA)?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct Trust {
    identity: Identity,
    roots: Arc<RootCertStore>,
    provider: Arc<CryptoProvider>,
}

impl Trust {
    /// Trusts the authority whose certificate is `ca_cert_pem`, and speaks as `identity`.
    ///
    /// # Errors
    /// [`PkiError::Pem`] or [`PkiError::Tls`] when `ca_cert_pem` is not a usable certificate.
    pub fn new(ca_cert_pem: &str, identity: &Identity) -> Result<Self, PkiError> {
        let mut roots = RootCertStore::empty();
        let authority = CertificateDer::from_pem_slice(ca_cert_pem.as_bytes())
            .map_err(|source| PkiError::Pem { what: "the authority's certificate", source })?;
        roots.add(authority)?;
        let provider = Arc::new(ring::default_provider());
        Ok(Self { identity: identity.clone(), roots: Arc::new(roots), provider })
    }

    /// Trusts and speaks as the files in `directory` say: `ca.pem`, `cert.pem` and `key.pem`.
    ///
    /// # Errors
    /// [`PkiError::File`] names the missing file; otherwise as for [`Identity::load`] and [`Trust::new`].
    pub fn load(directory: &Path) -> Result<Self, PkiError> {
        let ca_cert_pem = files::read(&directory.join(CA_CERT_FILE), Secrecy::Public)?;
        Self::new(&ca_cert_pem, &Identity::load(directory)?)
    }

    /// For the side that accepts: refuses peers without a certificate of this fleet.
    ///
    /// # Errors
    /// The identity's key and certificate do not belong together.
    pub fn server_config(&self, alpn: &[u8]) -> Result<ServerConfig, PkiError> {
        let verifier =
            WebPkiClientVerifier::builder_with_provider(self.roots.clone(), self.provider.clone()).build()?;
        let mut config = ServerConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(verifier)
            .with_single_cert(self.identity.chain()?, self.identity.key()?)?;
        config.alpn_protocols = vec![alpn.to_vec()];
        // A resumed session would rest on a certificate that was checked at some earlier time;
        // connections are too few to gain by that.
        config.send_tls13_tickets = 0;
        Ok(config)
    }

    /// For the side that dials: refuses servers that are not of this fleet, and those whose name is not
    /// the one that was dialled.
    ///
    /// # Errors
    /// The identity's key and certificate do not belong together.
    pub fn client_config(&self, alpn: &[u8]) -> Result<ClientConfig, PkiError> {
        let mut config = ClientConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_root_certificates(self.roots.clone())
            .with_client_auth_cert(self.identity.chain()?, self.identity.key()?)?;
        config.alpn_protocols = vec![alpn.to_vec()];
        config.resumption = rustls::client::Resumption::disabled();
        Ok(config)
    }

    /// Who this member is.
    ///
    /// # Errors
    /// The certificate carries no fleet identity.
    pub fn own_identity(&self) -> Result<crate::PeerIdentity, PkiError> {
        self.identity.peer()
    }
}
