//! Connections of the control plane to ports of guests: bytes from a QUIC stream to the VMM's vsock socket and back.
//!
//! Nothing is kept here. When the machine leaves, its VMM closes the socket and the stream ends with it; whoever used it goes on
//! with a new one to where the machine is then.

use std::io;
use std::rc::Rc;
use std::time::Duration;

use quinn::{RecvStream, SendStream};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use wire::fleet::{HostPhase, RefusalCode};
use wire::ids::MachineId;
use wire::streams::{StreamAnswer, StreamRequest};
use wire::vmm::VSOCK_OPEN;

use super::commands::Refusal;
use super::{Host, link};
use crate::vm::process::MachineDir;

/// How long a guest may take to accept. One that is paused for a move does not.
const ACCEPT_LIMIT: Duration = Duration::from_secs(3);
/// How long the control plane may take to say what a stream is for.
const REQUEST_LIMIT: Duration = Duration::from_secs(5);

/// Serves one stream.
pub(super) async fn serve(host: Rc<Host>, mut send: SendStream, mut receive: RecvStream) {
    let request = tokio::time::timeout(REQUEST_LIMIT, link::read::<StreamRequest>(&mut receive)).await;
    let connected = match request {
        Ok(Ok(StreamRequest::Guest { machine, port })) => host.connect_guest(machine, port).await,
        Ok(Ok(StreamRequest::Blob { .. })) => {
            Err(Refusal::new(RefusalCode::Protocol, "a host serves no blobs"))
        }
        Ok(Err(_)) | Err(_) => return,
    };
    let answer = match &connected {
        Ok(_) => StreamAnswer::Open { bytes: 0 },
        Err(Refusal { code, detail }) => StreamAnswer::Refused { code: *code, detail: detail.clone() },
    };
    if link::write(&mut send, &answer).await.is_err() {
        return;
    }
    if let Ok(guest) = connected {
        let _either_end_closed =
            tokio::io::copy_bidirectional(&mut tokio::io::join(receive, send), &mut { guest }).await;
    }
}

impl Host {
    async fn connect_guest(&self, id: MachineId, port: u32) -> Result<UnixStream, Refusal> {
        let runs = |phase| matches!(phase, HostPhase::Running | HostPhase::MigratingOut | HostPhase::Paused);
        let here = self.machine(id).filter(|machine| runs(machine.phase()));
        let machine = here.ok_or_else(|| {
            Refusal::new(RefusalCode::WrongState, format!("{id} does not run on this host"))
        })?;
        let path = MachineDir::of(&self.config.state, id).vsock();
        match tokio::time::timeout(ACCEPT_LIMIT, dial(&path, port)).await {
            Ok(Ok(guest)) => Ok(guest),
            Ok(Err(error)) => Err(Refusal::new(
                RefusalCode::WrongState,
                format!(
                    "nothing in {} answers on vsock port {port} ({error}): is its agent running?",
                    machine.spec().name
                ),
            )),
            Err(_) => Err(Refusal::new(
                RefusalCode::WrongState,
                format!(
                    "nothing in {} answered on vsock port {port} within {ACCEPT_LIMIT:?}: is its agent running?",
                    machine.spec().name
                ),
            )),
        }
    }
}

async fn dial(path: &std::path::Path, port: u32) -> io::Result<UnixStream> {
    let mut guest = UnixStream::connect(path).await?;
    guest.write_all(&port.to_le_bytes()).await?;
    match guest.read_u8().await? {
        VSOCK_OPEN => Ok(guest),
        other => Err(io::Error::new(io::ErrorKind::InvalidData, format!("the VMM said {other}"))),
    }
}
