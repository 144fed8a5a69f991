//! Everything that can be wrong with keys, certificates and the files that hold them.

use std::path::PathBuf;

/// Why a key, a certificate or a TLS configuration could not be made or understood.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// The name cannot be one label of a DNS name.
    #[error("'{name}' is not a usable name: 1 to 63 of a-z, 0-9 and '-', not beginning or ending with '-'")]
    Name {
        /// What was given.
        name: String,
    },
    /// The DNS name is not `<name>.<kind>.mashines`.
    #[error("'{0}' is not an identity of a fleet (expected <name>.<host|control|client>.mashines)")]
    Identity(String),
    /// The certificate cannot be parsed.
    #[error("the peer's certificate cannot be parsed")]
    Certificate(#[source] x509_parser::error::X509Error),
    /// The certificate does not carry exactly one fleet identity.
    #[error("the peer's certificate carries {found} DNS names; exactly one is expected")]
    NotOneName {
        /// How many DNS names it carries.
        found: usize,
    },
    /// The peer presented no certificate.
    #[error("the peer presented no certificate")]
    NoCertificate,
    /// Making a key or a certificate failed.
    #[error("making a key or certificate failed")]
    Generate(#[from] rcgen::Error),
    /// A file could not be read or written.
    #[error("{action} {}", path.display())]
    File {
        /// What was being done, for example "reading".
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// A private key can be read by others than its owner.
    #[error("{} can be read by others (mode {mode:o}); run: chmod 600 {}", path.display(), path.display())]
    KeyMode {
        /// The key file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The text is not PEM with the expected content.
    #[error("{what} is not valid PEM")]
    Pem {
        /// What was being parsed.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: rustls::pki_types::pem::Error,
    },
    /// rustls refused the key or the certificates.
    #[error("TLS configuration refused")]
    Tls(#[from] rustls::Error),
    /// The verifier of client certificates could not be made.
    #[error("no verifier for client certificates")]
    Verifier(#[from] rustls::server::VerifierBuilderError),
}
