//! A member's own key and certificate.

use std::path::Path;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use crate::files::{self, Secrecy};
use crate::{PeerIdentity, PkiError};

/// File name of the certificate chain within an identity's directory.
pub const CERT_FILE: &str = "cert.pem";
/// File name of the private key within an identity's directory.
pub const KEY_FILE: &str = "key.pem";

/// A private key with the certificate chain that proves whose it is.
///
/// `Debug` does not show the key.
#[derive(Clone)]
pub struct Identity {
    /// Leaf certificate, PEM.
    pub cert_chain_pem: String,
    /// Private key, PKCS#8 PEM. Whoever holds it is this member.
    pub key_pem: String,
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Identity").field("cert_chain_pem", &self.cert_chain_pem).finish_non_exhaustive()
    }
}

impl Identity {
    /// Writes `cert.pem` (0644) and `key.pem` (0600) into `directory`, which must exist.
    ///
    /// # Errors
    /// [`PkiError::File`] with the path that could not be written.
    pub fn save(&self, directory: &Path) -> Result<(), PkiError> {
        files::write(&directory.join(KEY_FILE), &self.key_pem, Secrecy::Private)?;
        files::write(&directory.join(CERT_FILE), &self.cert_chain_pem, Secrecy::Public)
    }

    /// Reads what [`Identity::save`] wrote.
    ///
    /// # Errors
    /// [`PkiError::File`] when a file is missing, [`PkiError::KeyMode`] when others can read the key,
    /// [`PkiError::Pem`] when a file holds something else.
    pub fn load(directory: &Path) -> Result<Self, PkiError> {
        let identity = Self {
            cert_chain_pem: files::read(&directory.join(CERT_FILE), Secrecy::Public)?,
            key_pem: files::read(&directory.join(KEY_FILE), Secrecy::Private)?,
        };
        identity.chain()?;
        identity.key()?;
        Ok(identity)
    }

    /// Whose identity this is, from its own certificate.
    ///
    /// # Errors
    /// The certificate is malformed or carries no fleet identity.
    pub fn peer(&self) -> Result<PeerIdentity, PkiError> {
        PeerIdentity::from_chain(&self.chain()?)
    }

    pub(crate) fn chain(&self) -> Result<Vec<CertificateDer<'static>>, PkiError> {
        CertificateDer::pem_slice_iter(self.cert_chain_pem.as_bytes())
            .collect::<Result<Vec<_>, _>>()
            .map_err(|source| PkiError::Pem { what: "the certificate chain", source })
    }

    pub(crate) fn key(&self) -> Result<PrivateKeyDer<'static>, PkiError> {
        PrivateKeyDer::from_pem_slice(self.key_pem.as_bytes())
            .map_err(|source| PkiError::Pem { what: "the private key", source })
    }
}
