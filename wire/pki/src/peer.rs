//! Names of the fleet's members, and how they are read from a certificate.

use std::fmt;
use std::str::FromStr;

use rustls::pki_types::CertificateDer;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate, X509Error};

use crate::PkiError;

/// The last label of every identity: not a public domain, so no public authority can issue it.
const DOMAIN: &str = "mashines";

/// What a member of the fleet is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// A host that runs machines.
    Host,
    /// The control plane.
    Control,
    /// A person or a program that uses the fleet.
    Client,
}

impl Kind {
    /// The label that stands for this kind within an identity.
    pub fn label(self) -> &'static str {
        match self {
            Kind::Host => "host",
            Kind::Control => "control",
            Kind::Client => "client",
        }
    }
}

/// A member of the fleet: its kind and its name, unique within that kind.
///
/// The textual form is the DNS name in its certificate, for example `host-a.host.mashines`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PeerIdentity {
    kind: Kind,
    name: String,
}

impl PeerIdentity {
    /// A member called `name`: 1 to 63 characters of `a-z`, `0-9` and `-`, with no `-` at either end.
    ///
    /// # Errors
    /// [`PkiError::Name`] for any other name.
    pub fn new(kind: Kind, name: &str) -> Result<Self, PkiError> {
        let legal = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        let good = (1..=63).contains(&name.len())
            && name.bytes().all(legal)
            && !name.starts_with('-')
            && !name.ends_with('-');
        if !good {
            return Err(PkiError::Name { name: name.to_owned() });
        }
        Ok(Self { kind, name: name.to_owned() })
    }

    /// What it is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Its name, without kind and domain.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The name to give to TLS when dialling this peer, and the name in its certificate.
    pub fn dns_name(&self) -> String {
        self.to_string()
    }

    /// Reads the identity out of a certificate chain whose signatures TLS has already verified.
    ///
    /// # Errors
    /// The chain is empty, the certificate is malformed, or it does not carry exactly one fleet
    /// identity as its only DNS name.
    pub fn from_chain(chain: &[CertificateDer<'_>]) -> Result<Self, PkiError> {
        let leaf = chain.first().ok_or(PkiError::NoCertificate)?;
        let (_, certificate) = X509Certificate::from_der(leaf).map_err(|error| {
            PkiError::Certificate(match error {
                x509_parser::nom::Err::Error(e) | x509_parser::nom::Err::Failure(e) => e,
                x509_parser::nom::Err::Incomplete(_) => X509Error::InvalidCertificate,
            })
        })?;
        let extension = certificate.subject_alternative_name().map_err(PkiError::Certificate)?;
        let names: Vec<&str> = extension
            .iter()
            .flat_map(|san| san.value.general_names.iter())
            .filter_map(|name| match name {
                GeneralName::DNSName(dns) => Some(*dns),
                _ => None,
            })
            .collect();
        match names.as_slice() {
            [one] => one.parse(),
            other => Err(PkiError::NotOneName { found: other.len() }),
        }
    }
}

impl fmt::Display for PeerIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{DOMAIN}", self.name, self.kind.label())
    }
}

impl FromStr for PeerIdentity {
    type Err = PkiError;

    fn from_str(text: &str) -> Result<Self, PkiError> {
        let wrong = || PkiError::Identity(text.to_owned());
        let labels: Vec<&str> = text.split('.').collect();
        let &[name, kind, DOMAIN] = labels.as_slice() else { return Err(wrong()) };
        let kind = [Kind::Host, Kind::Control, Kind::Client]
            .into_iter()
            .find(|candidate| candidate.label() == kind)
            .ok_or_else(wrong)?;
        Self::new(kind, name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_form_round_trips_and_rejects_lookalikes() {
        let peer = PeerIdentity::new(Kind::Host, "host-a").unwrap();
        assert_eq!(peer.dns_name(), "host-a.host.mashines");
        assert_eq!(peer.dns_name().parse::<PeerIdentity>().unwrap(), peer);
        for bad in
            ["host-a.host", "a.b.host.mashines", "a.guest.mashines", "A.host.mashines", ".host.mashines"]
        {
            assert!(bad.parse::<PeerIdentity>().is_err(), "{bad} was accepted");
        }
        for bad in ["", "-a", "a-", "a.b", "a b", "ä", &"x".repeat(64)] {
            assert!(matches!(PeerIdentity::new(Kind::Client, bad), Err(PkiError::Name { .. })), "{bad}");
        }
    }

    #[test]
    fn garbage_is_an_error_and_no_panic() {
        assert!(matches!(PeerIdentity::from_chain(&[]), Err(PkiError::NoCertificate)));
        for length in [0_u8, 1, 7, 200] {
            let der = CertificateDer::from((0..length).map(|i| i.wrapping_mul(37)).collect::<Vec<_>>());
            assert!(matches!(PeerIdentity::from_chain(&[der]), Err(PkiError::Certificate(_))));
        }
    }
}
