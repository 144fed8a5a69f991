//! The fleet's certificate authority.
//!
//! ECDSA P-256 throughout: every TLS stack takes it, and signing is cheap enough that a handshake
//! costs a fraction of a millisecond. The authority's key is used by `mashines fleet init` and when a
//! host joins; running hosts never hold it.

use std::path::Path;
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256,
};

use crate::files::{self, Secrecy};
use crate::{Identity, Kind, PeerIdentity, PkiError};

/// File name of the authority's certificate: public, every member has a copy.
pub const CA_CERT_FILE: &str = "ca.pem";
/// File name of the authority's private key.
pub const CA_KEY_FILE: &str = "ca-key.pem";

const DAY: Duration = Duration::from_secs(24 * 3600);
/// Certificates begin to be valid this long ago, so that members whose clocks are behind can join.
const BACKDATE: Duration = DAY;
/// The authority outlives its members' certificates.
const CA_LIFETIME: Duration = Duration::from_secs(20 * 365 * 24 * 3600);
/// Rotation is by hand (issue again, restart), so this is generous.
const MEMBER_LIFETIME: Duration = Duration::from_secs(5 * 365 * 24 * 3600);

/// The authority that makes members of a fleet.
pub struct FleetCa {
    cert_pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl std::fmt::Debug for FleetCa {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FleetCa").field("cert_pem", &self.cert_pem).finish_non_exhaustive()
    }
}

impl FleetCa {
    /// A new authority with a new key.
    ///
    /// # Errors
    /// [`PkiError::Generate`] when the system gives no randomness.
    pub fn create() -> Result<Self, PkiError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "mashines fleet authority");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        set_lifetime(&mut params, CA_LIFETIME);
        let cert_pem = params.self_signed(&key)?.pem();
        Ok(Self { cert_pem, issuer: Issuer::new(params, key) })
    }

    /// Writes `ca.pem` (0644) and `ca-key.pem` (0600) into `directory`, which must exist.
    ///
    /// # Errors
    /// [`PkiError::File`] with the path that could not be written.
    pub fn save(&self, directory: &Path) -> Result<(), PkiError> {
        let key_pem = self.issuer.key().serialize_pem();
        files::write(&directory.join(CA_KEY_FILE), &key_pem, Secrecy::Private)?;
        files::write(&directory.join(CA_CERT_FILE), &self.cert_pem, Secrecy::Public)
    }

    /// Reads what [`FleetCa::save`] wrote.
    ///
    /// # Errors
    /// [`PkiError::File`], [`PkiError::KeyMode`], or [`PkiError::Generate`] when the content is not a
    /// key and a certificate.
    pub fn load(directory: &Path) -> Result<Self, PkiError> {
        let cert_pem = files::read(&directory.join(CA_CERT_FILE), Secrecy::Public)?;
        let key_pem = files::read(&directory.join(CA_KEY_FILE), Secrecy::Private)?;
        let issuer = Issuer::from_ca_cert_pem(&cert_pem, KeyPair::from_pem(&key_pem)?)?;
        Ok(Self { cert_pem, issuer })
    }

    /// The authority's certificate, for members to trust.
    pub fn cert_pem(&self) -> &str {
        &self.cert_pem
    }

    /// Makes a key and a certificate for the member called `name`; it may act as TLS server and client.
    ///
    /// # Errors
    /// [`PkiError::Name`] for a name that cannot be one label of a DNS name.
    pub fn issue(&self, name: &str, kind: Kind) -> Result<Identity, PkiError> {
        let peer = PeerIdentity::new(kind, name)?;
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut params = CertificateParams::new(vec![peer.dns_name()])?;
        params.distinguished_name.push(DnType::CommonName, peer.dns_name());
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        set_lifetime(&mut params, MEMBER_LIFETIME);
        let certificate = params.signed_by(&key, &self.issuer)?;
        Ok(Identity { cert_chain_pem: certificate.pem(), key_pem: key.serialize_pem() })
    }
}

fn set_lifetime(params: &mut CertificateParams, lifetime: Duration) {
    let now = SystemTime::now();
    params.not_before = (now - BACKDATE).into();
    params.not_after = (now + lifetime).into();
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    #[test]
    fn issued_identity_names_its_owner() {
        let ca = FleetCa::create().unwrap();
        let identity = ca.issue("host-a", Kind::Host).unwrap();
        let peer = identity.peer().unwrap();
        assert_eq!((peer.kind(), peer.name()), (Kind::Host, "host-a"));
        assert!(ca.issue("not a name", Kind::Host).is_err());
    }

    #[test]
    fn saved_authority_goes_on_issuing_and_keys_stay_private() {
        let directory = tempfile::tempdir().unwrap();
        let ca = FleetCa::create().unwrap();
        ca.save(directory.path()).unwrap();
        let again = FleetCa::load(directory.path()).unwrap();
        assert_eq!(again.cert_pem(), ca.cert_pem());
        again.issue("control", Kind::Control).unwrap().save(directory.path()).unwrap();
        for secret in [CA_KEY_FILE, crate::KEY_FILE] {
            let mode = std::fs::metadata(directory.path().join(secret)).unwrap().mode();
            assert_eq!(mode & 0o777, 0o600, "{secret}");
        }
        Identity::load(directory.path()).unwrap();

        let exposed = directory.path().join(crate::KEY_FILE);
        std::fs::set_permissions(&exposed, PermissionsExt::from_mode(0o640)).unwrap();
        assert!(matches!(Identity::load(directory.path()), Err(PkiError::KeyMode { mode: 0o640, .. })));
    }
}
