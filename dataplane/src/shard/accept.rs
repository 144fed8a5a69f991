//! Connections that other hosts make to this shard: control streams go to their session, lanes into memory.

use std::rc::Rc;

use wire::migration::messages::{SourceMessage, VERSION};

use super::ShardContext;
use super::stream;
use crate::migrate::target::{ControlStream, TargetInput};
use crate::migrate::target_lane;
use crate::quic::{Connection, RecvStream, SendStream};

/// Serves whoever connects, until the endpoint is shut down.
pub(super) async fn accept_all(context: Rc<ShardContext>) {
    while let Ok(connection) = context.endpoint.accept().await {
        if connection.peer().kind() != pki::Kind::Host {
            connection.close(1, "only hosts move machines");
            continue;
        }
        glommio::spawn_local(accept_control(context.clone(), connection.clone())).detach();
        glommio::spawn_local(accept_lanes(context.clone(), connection)).detach();
    }
}

async fn accept_lanes(context: Rc<ShardContext>, connection: Connection) {
    while let Ok(lane) = connection.accept_uni().await {
        glommio::spawn_local(target_lane::serve(context.clone(), connection.clone(), lane)).detach();
    }
}

async fn accept_control(context: Rc<ShardContext>, connection: Connection) {
    while let Ok((send, receive)) = connection.accept_bi().await {
        glommio::spawn_local(serve_control(context.clone(), connection.clone(), send, receive)).detach();
    }
}

/// Reads a control stream and hands its messages to the session of the migration that the first one names.
async fn serve_control(
    context: Rc<ShardContext>,
    connection: Connection,
    mut send: SendStream,
    mut receive: RecvStream,
) {
    let Ok(Some(first)) = stream::receive::<SourceMessage>(&mut receive).await else { return };
    let Some((migration, _)) = first.opens() else {
        return connection.close(1, "a control stream begins with an offer or a commit");
    };
    let session = context.targets.borrow().get(&migration).cloned();
    let Some(session) = session.filter(|s| s.source().as_str() == connection.peer_host()) else {
        return answer_as_stranger(&context, &connection, &mut send, &first).await;
    };
    let number = context.next_session();
    session.input(TargetInput::Opened(ControlStream {
        session: number,
        connection: connection.clone(),
        send,
    }));
    let mut message = Some(first);
    while let Some(current) = message.take() {
        session.input(TargetInput::Message { session: number, message: current });
        match stream::receive(&mut receive).await {
            Ok(next) => message = next,
            Err(error) => tracing::debug!(%migration, ?error, "control stream broke"),
        }
    }
    session.input(TargetInput::LinkLost { session: number });
}

/// Says that nothing is known here; but not about a commit that an earlier `mashined` of this host may have carried out: then silence
/// leaves the decision to the control plane.
async fn answer_as_stranger(
    context: &ShardContext,
    connection: &Connection,
    send: &mut SendStream,
    first: &SourceMessage,
) {
    let may_own = matches!(first, SourceMessage::Commit(c) if context.adopted_epochs.contains(&c.epoch));
    if !may_own
        && stream::send(send, VERSION, &first.answer_of_a_stranger()).await.is_ok()
        && send.finish().is_ok()
    {
        let _peer_gone = send.acknowledged().await;
    }
    connection.close(0, "not expected here");
}
