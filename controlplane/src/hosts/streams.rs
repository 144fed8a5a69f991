//! Streams beside a host's command stream ([`wire::streams`]): connections to guests that we open, blobs that hosts ask for.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use quinn::{Connection, RecvStream, SendStream};
use tokio::fs::File;
use tokio::io::{AsyncReadExt as _, AsyncSeekExt as _};
use wire::fleet::RefusalCode;
use wire::ids::{Digest, MachineId};
use wire::streams::{StreamAnswer, StreamRequest};

use super::frames::{LinkError, read, write};

/// How long a host may take to answer: what a guest may take to accept, and then some.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// How much of a blob is read at a time.
const READ_BYTES: usize = 1 << 20;

/// Why there is no connection to a guest.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// The host did not answer, or not in a way that fits.
    #[error("the host did not answer")]
    Host(#[from] LinkError),
    /// It did not answer in time.
    #[error("the host did not answer within {ANSWER_LIMIT:?}")]
    Silent,
    /// It said no.
    #[error("{detail}")]
    Refused {
        /// For programs.
        code: RefusalCode,
        /// For people.
        detail: String,
    },
}

/// Opens a connection to a vsock port of a guest on that host.
///
/// # Errors
/// [`GuestError`].
pub async fn connect_guest(
    host: &Connection,
    machine: MachineId,
    port: u32,
) -> Result<(SendStream, RecvStream), GuestError> {
    let connected = async {
        let (mut send, mut receive) = host.open_bi().await.map_err(LinkError::from)?;
        write(&mut send, &StreamRequest::Guest { machine, port }).await?;
        match read::<StreamAnswer>(&mut receive).await? {
            Some((_, StreamAnswer::Open { .. })) => Ok((send, receive)),
            Some((_, StreamAnswer::Refused { code, detail })) => Err(GuestError::Refused { code, detail }),
            None => Err(GuestError::Silent),
        }
    };
    tokio::time::timeout(ANSWER_LIMIT, connected).await.unwrap_or(Err(GuestError::Silent))
}

/// Serves what a host asks for until its connection ends.
pub(super) async fn serve(connection: Connection, images: Arc<Path>) {
    while let Ok((send, receive)) = connection.accept_bi().await {
        let images = images.clone();
        tokio::spawn(async move {
            if let Err(error) = answer(send, receive, &images).await {
                tracing::info!(%error, "a host's stream ended early");
            }
        });
    }
}

async fn answer(mut send: SendStream, mut receive: RecvStream, images: &Path) -> Result<(), LinkError> {
    let request = tokio::time::timeout(ANSWER_LIMIT, read::<StreamRequest>(&mut receive)).await;
    let Ok(Some((_, request))) = request.unwrap_or(Ok(None)) else { return Ok(()) };
    let StreamRequest::Blob { digest, offset } = request else {
        let detail = "the control plane has no guests".to_owned();
        return write(&mut send, &StreamAnswer::Refused { code: RefusalCode::Protocol, detail }).await;
    };
    let (mut file, bytes) = match open(images, digest, offset).await {
        Ok(opened) => opened,
        Err(error) => {
            let detail = format!(
                "the control plane cannot give {digest} ({error}); import the image again, into {}",
                images.display()
            );
            return write(&mut send, &StreamAnswer::Refused { code: RefusalCode::NoBlob, detail }).await;
        }
    };
    write(&mut send, &StreamAnswer::Open { bytes }).await?;
    let mut buffer = vec![0; READ_BYTES];
    // A file that cannot be read on ends the stream early; the host sees that bytes are missing.
    while let Ok(count @ 1..) = file.read(&mut buffer).await {
        send.write_all(&buffer[..count]).await?;
    }
    let _ = send.finish();
    let _ = send.stopped().await;
    Ok(())
}

async fn open(images: &Path, digest: Digest, offset: u64) -> io::Result<(File, u64)> {
    let path: PathBuf = images.join("blobs/sha256").join(digest.hex());
    let mut file = File::open(path).await?;
    let bytes = file.metadata().await?.len();
    file.seek(io::SeekFrom::Start(offset)).await?;
    Ok((file, bytes))
}
