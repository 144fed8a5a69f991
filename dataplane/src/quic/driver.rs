//! The loop that moves a shard's datagrams.
//!
//! Each turn has a budget for receiving and one for sending, so that neither starves the other, nor the
//! shard's other tasks: receive, hand to the connections, fire timers, let each connection that has
//! something to do wake its users and send. A turn that did something yields, so that the users run;
//! only after a turn that did nothing does the driver wait, for a datagram, a timer or its bell.
//!
//! When the socket itself breaks (never seen; a closed descriptor would do it) all connections end by
//! their idle timeout, as if the link were cut.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use glommio::timer::Timer;
use quinn_proto::{ConnectionHandle, DatagramEvent, Incoming, Transmit};

use super::Connection;
use super::endpoint::{Core, server_config};
use super::pool::Pool;
use super::shared::{Phase, Shared};
use super::socket::{RECEIVE_BYTES_MAX, Received, Sent};

/// Receive calls per turn, each up to 64 KiB.
const RECEIVES_PER_TURN: usize = 16;
/// Segmented sends per turn, each up to 64 KiB.
const SENDS_PER_TURN: usize = 8;
/// Datagrams are received into blocks of this size and handed on as views of them.
const BLOCK_BYTES: usize = 4 * RECEIVE_BYTES_MAX;
/// While there is traffic, the executor never sleeps for longer than this: it may wrongly think that there
/// is nothing to do (see [`crate::shards`]), and a transfer cannot wait for the shard's slow pulse.
const BUSY_PULSE: Duration = Duration::from_millis(1);
/// How long after the last datagram there still is traffic.
const BUSY: Duration = Duration::from_millis(50);
/// How long to leave a socket alone that answers every call with an error.
const BROKEN_SOCKET_PAUSE: Duration = Duration::from_millis(100);

type Pending = Pin<Box<dyn Future<Output = ()>>>;

pub(super) struct Driver {
    core: Rc<Core>,
    /// What is received into.
    block: BytesMut,
    blocks: Pool,
    /// Where packets are made before they are sent.
    outgoing: Vec<u8>,
    /// What did not fit into the send buffer: the rest goes out when the first datagram of it has.
    blocked: Option<Pending>,
    readable: Option<Pending>,
    /// No connection wants to be looked at before this.
    next_deadline: Option<Instant>,
    busy_until: Instant,
    pulse: Option<Timer>,
}

impl Driver {
    pub(super) fn new(core: Rc<Core>) -> Self {
        // What peers may have in flight to one connection bounds what readers can hold on to.
        let window = usize::try_from(core.options.receive_window_bytes).unwrap_or(usize::MAX);
        let mut blocks = Pool::new(BLOCK_BYTES, window / BLOCK_BYTES + 4);
        Self {
            core,
            block: blocks.take(),
            blocks,
            outgoing: Vec::with_capacity(RECEIVE_BYTES_MAX),
            blocked: None,
            readable: None,
            next_deadline: None,
            busy_until: Instant::now(),
            pulse: None,
        }
    }

    /// Runs until the endpoint is shut down or abandoned, and its last connection gone.
    pub(super) async fn run(mut self) {
        while !self.finished() {
            let received = match self.receive() {
                Ok(count) => count,
                Err(error) => {
                    tracing::error!(%error, "the shard's UDP socket is broken");
                    Timer::new(BROKEN_SOCKET_PAUSE).await;
                    0
                }
            };
            self.fire_timers();
            let driven = self.drive();
            if received == 0 && driven == 0 {
                self.wait().await;
            } else {
                self.busy_until = Instant::now() + BUSY;
                self.yield_now().await;
            }
        }
        self.core.stopped.set(true);
        self.core.waiting.borrow_mut().acceptors.wake_all();
        self.core.stop_waiters.borrow_mut().wake_all();
    }

    fn finished(&self) -> bool {
        (self.core.closing.get() || self.core.abandoned.get()) && self.core.connections.borrow().is_empty()
    }

    /// Receives up to the budget; returns how many calls brought something.
    fn receive(&mut self) -> std::io::Result<usize> {
        for count in 0..RECEIVES_PER_TURN {
            if self.block.capacity() - self.block.len() < RECEIVE_BYTES_MAX {
                let full = std::mem::replace(&mut self.block, self.blocks.take());
                self.blocks.give(full);
            }
            let Some(received) = self.core.socket.try_receive(&mut self.block)? else { return Ok(count) };
            let data = self.block.split_to(received.bytes);
            self.dispatch(&received, data);
        }
        Ok(RECEIVES_PER_TURN)
    }

    /// Splits what was received into datagrams and hands each to whom it concerns.
    fn dispatch(&mut self, received: &Received, mut data: BytesMut) {
        let now = Instant::now();
        let mut last: Option<Rc<Shared>> = None;
        while !data.is_empty() {
            let datagram = data.split_to(received.stride.min(data.len()));
            self.outgoing.clear();
            let event = self.core.proto.borrow_mut().handle(
                now,
                received.from,
                Some(received.local_ip),
                None,
                datagram,
                &mut self.outgoing,
            );
            match event {
                Some(DatagramEvent::ConnectionEvent(handle, event)) => {
                    if last.as_ref().is_none_or(|shared| shared.key != handle.0) {
                        last = self.core.connections.borrow().get(&handle.0).cloned();
                    }
                    if let Some(shared) = &last {
                        shared.state.borrow_mut().proto.handle_event(event);
                        shared.touch();
                    }
                }
                Some(DatagramEvent::NewConnection(incoming)) => self.take_incoming(incoming, now),
                Some(DatagramEvent::Response(transmit)) => self.respond(&transmit),
                None => {}
            }
        }
    }

    /// Begins a handshake, or refuses when too many wait already.
    fn take_incoming(&mut self, incoming: Incoming, now: Instant) {
        let core = self.core.clone();
        let mut waiting = core.waiting.borrow_mut();
        let full = waiting.handshakes + waiting.ready.len() >= core.options.accept_backlog;
        self.outgoing.clear();
        if full || core.closing.get() || core.abandoned.get() {
            let refusal = core.proto.borrow_mut().refuse(incoming, &mut self.outgoing);
            return self.respond(&refusal);
        }
        let config =
            server_config(&core.options, core.server_crypto.clone(), Some(incoming.remote_address()));
        let accepted = core.proto.borrow_mut().accept(incoming, now, &mut self.outgoing, Some(config));
        match accepted {
            Ok((handle, proto)) => {
                waiting.handshakes += 1;
                core.adopt(handle, proto);
            }
            Err(error) => {
                tracing::debug!(cause = %error.cause, "an incoming connection failed at once");
                if let Some(response) = error.response {
                    self.respond(&response);
                }
            }
        }
    }

    /// Sends what the endpoint itself has to say; it may be lost like any datagram.
    fn respond(&self, transmit: &Transmit) {
        if let Some(data) = self.outgoing.get(..transmit.size) {
            let _ = self.core.socket.try_send(transmit, data);
        }
    }

    /// Queues the connections whose time has come.
    fn fire_timers(&mut self) {
        let Some(deadline) = self.next_deadline else { return };
        let now = Instant::now();
        if now < deadline {
            return;
        }
        self.next_deadline = None;
        for shared in self.core.connections.borrow().values() {
            match shared.deadline.get() {
                Some(due) if due <= now => shared.touch(),
                due => self.next_deadline = earlier(self.next_deadline, due),
            }
        }
    }

    /// Looks after the connections on the list, within the sending budget; returns how many there were.
    fn drive(&mut self) -> usize {
        let mut budget = SENDS_PER_TURN;
        let listed = self.core.bell.len();
        for _ in 0..listed {
            let Some(key) = self.core.bell.next() else { break };
            let Some(shared) = self.core.connections.borrow().get(&key).cloned() else { continue };
            shared.taken();
            let more = self.drive_one(&shared, &mut budget);
            if more && self.blocked.is_none() {
                shared.touch();
            }
        }
        listed
    }

    /// Timers, events and packets of one connection; true when the budget left some packets unsent.
    fn drive_one(&mut self, shared: &Rc<Shared>, budget: &mut usize) -> bool {
        let now = Instant::now();
        let handle = ConnectionHandle(shared.key);
        let mut state = shared.state.borrow_mut();
        if state.proto.poll_timeout().is_some_and(|due| due <= now) {
            state.proto.handle_timeout(now);
        }
        let was_handshaking = matches!(state.phase, Phase::Handshaking);
        while let Some(event) = state.proto.poll() {
            state.apply(event);
        }
        let more = self.transmit(&mut state.proto, now, budget);
        while let Some(event) = state.proto.poll_endpoint_events() {
            if let Some(answer) = self.core.proto.borrow_mut().handle_event(handle, event) {
                state.proto.handle_event(answer);
            }
        }
        let deadline = state.proto.poll_timeout();
        shared.deadline.set(deadline);
        self.next_deadline = earlier(self.next_deadline, deadline);
        let drained = state.proto.is_drained();
        let incoming = state.proto.side().is_server();
        let left_handshake = was_handshaking && !matches!(state.phase, Phase::Handshaking);
        drop(state);

        if left_handshake && incoming {
            self.announce(shared);
        }
        if drained {
            self.core.connections.borrow_mut().remove(&shared.key);
        }
        more && !drained
    }

    /// An incoming connection has left its handshake, for better or worse.
    fn announce(&self, shared: &Rc<Shared>) {
        let connection = Connection::established(shared.clone());
        let mut waiting = self.core.waiting.borrow_mut();
        waiting.handshakes = waiting.handshakes.saturating_sub(1);
        if let Some(connection) = connection {
            waiting.ready.push_back(connection);
            waiting.acceptors.wake_all();
        }
    }

    /// Sends what the connection has; true when the budget ran out first.
    fn transmit(&mut self, proto: &mut quinn_proto::Connection, now: Instant, budget: &mut usize) -> bool {
        loop {
            if *budget == 0 || self.blocked.is_some() {
                return true;
            }
            self.outgoing.clear();
            let segments = self.core.socket.segments_max(proto.current_mtu());
            let Some(transmit) = proto.poll_transmit(now, segments, &mut self.outgoing) else { return false };
            *budget -= 1;
            let Some(data) = self.outgoing.get(..transmit.size) else { continue };
            match self.core.socket.try_send(&transmit, data) {
                Ok(Sent::Done) => {}
                Ok(Sent::Full) => self.blocked = Some(self.send_later(&transmit, data)),
                Err(error) => tracing::error!(%error, "sending on the shard's UDP socket"),
            }
        }
    }

    /// Sends a run of datagrams when the send buffer has room, then has all connections looked at.
    fn send_later(&self, transmit: &Transmit, data: &[u8]) -> Pending {
        let core = self.core.clone();
        let to = transmit.destination;
        let stride = transmit.segment_size.unwrap_or(data.len()).max(1);
        let data = Bytes::copy_from_slice(data);
        Box::pin(async move {
            for start in (0..data.len()).step_by(stride) {
                let end = data.len().min(start + stride);
                core.socket.send_when_possible(to, data[start..end].to_vec()).await;
            }
            for shared in core.connections.borrow().values() {
                shared.touch();
            }
        })
    }

    /// Lets the shard's other tasks run, with a timer armed.
    async fn yield_now(&mut self) {
        let pulse = self.pulse.get_or_insert_with(|| Timer::new(BUSY_PULSE));
        let mut beaten = false;
        poll_fn(|cx| {
            beaten = Pin::new(&mut *pulse).poll(cx).is_ready();
            Poll::Ready(())
        })
        .await;
        if beaten {
            self.pulse = None;
        }
        glommio::executor().yield_now().await;
    }

    /// Waits for a datagram, for room to send, for the next timer, or for the bell.
    async fn wait(&mut self) {
        let now = Instant::now();
        let pulse = (now < self.busy_until).then(|| now + BUSY_PULSE);
        let mut timer =
            earlier(self.next_deadline, pulse).map(|due| Timer::new(due.saturating_duration_since(now)));
        if self.readable.is_none() {
            self.readable = Some(Box::pin(self.core.socket.readable()));
        }
        poll_fn(|cx| {
            let rung = self.core.bell.poll_rung(cx).is_ready();
            let timed = timer.as_mut().is_some_and(|timer| Pin::new(timer).poll(cx).is_ready());
            let readable = finish(&mut self.readable, cx);
            let room = finish(&mut self.blocked, cx);
            if rung || timed || readable || room { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }
}

/// Polls what is pending, and clears it when it is done.
fn finish(pending: &mut Option<Pending>, cx: &mut Context<'_>) -> bool {
    let done = pending.as_mut().is_some_and(|future| future.as_mut().poll(cx).is_ready());
    if done {
        *pending = None;
    }
    done
}

fn earlier(a: Option<Instant>, b: Option<Instant>) -> Option<Instant> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (one, other) => one.or(other),
    }
}
