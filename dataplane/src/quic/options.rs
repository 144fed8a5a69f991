//! What can be set about a shard's transport, with the reasons for the defaults.

use std::sync::Arc;
use std::time::Duration;

use quinn_proto::congestion::CubicConfig;
use quinn_proto::{IdleTimeout, MtuDiscoveryConfig, TransportConfig, VarInt};

use super::QuicError;

/// Largest UDP payload over IPv4, and the most that one segmented send may carry in all. More makes
/// the kernel refuse the send, which looks like a path that drops everything large.
pub(super) const UDP_PAYLOAD_MAX: u16 = 65_507;
/// QUIC works on no path that carries less.
pub(super) const MTU_MIN: u16 = 1200;
/// IPv6 and UDP headers: what the route's MTU is reduced by, also for IPv4 where it is 20 too many.
const HEADERS: u32 = 40 + 8;

/// Settings of one endpoint and of every connection it makes or takes.
///
/// MTU figures are UDP payload bytes.
#[derive(Debug, Clone)]
pub struct TransportOptions {
    /// Datagram size to begin with, 1200 to 9000. The route's own MTU lowers it. Default 1452:
    /// Ethernet's 1500 less IPv6 and UDP headers.
    pub mtu_initial: u16,
    /// Discovery stops here, `mtu_initial` to 65507. The route's own MTU lowers it, so that nobody
    /// probes for what the interface cannot carry. Default 65507.
    pub mtu_max: u16,
    /// Unread bytes the peer may have in flight to us on one connection. At least the
    /// bandwidth-delay product, and less than the socket buffer can hold (the kernel grants twice what
    /// it is asked for, and counts its overhead): 8 MiB lost packets whenever the shard was busy, 4 MiB
    /// none, at the same goodput. The receiver's memory use is bounded by it. Default 4 MiB.
    pub receive_window_bytes: u32,
    /// The same for one stream. Default 2 MiB: one stream that is not read must leave credit for the
    /// others, or their peer waits with it.
    pub stream_window_bytes: u32,
    /// Bytes we hold for retransmission on one connection; writers wait beyond it. Default 4 MiB.
    pub send_window_bytes: u32,
    /// Congestion window to begin with. Default 1 MiB: the links between hosts are ours, and a first
    /// pass that has to grow from 14 KiB wastes its first dozen round trips.
    pub congestion_window_initial_bytes: u32,
    /// How often a quiet connection is probed. Default 500 ms.
    pub keep_alive: Duration,
    /// After this much silence the peer counts as dead. Default 3 s; must be at least three times
    /// `keep_alive`, so that one or two lost probes do not kill a connection.
    pub idle_timeout: Duration,
    /// Unidirectional streams the peer may have open at once. Default 256.
    pub uni_streams_max: u32,
    /// Bidirectional streams the peer may have open at once. Default 64.
    pub bi_streams_max: u32,
    /// Incoming connections that are in their handshake or wait for `accept`; more are refused.
    /// Default 64.
    pub accept_backlog: usize,
    /// Kernel buffer asked for in each direction. Default 4 MiB: the usual 208 KiB loses packets while
    /// the shard is busy for a millisecond.
    pub socket_buffer_bytes: usize,
}

impl Default for TransportOptions {
    fn default() -> Self {
        Self {
            mtu_initial: 1452,
            mtu_max: UDP_PAYLOAD_MAX,
            receive_window_bytes: 4 << 20,
            stream_window_bytes: 2 << 20,
            send_window_bytes: 4 << 20,
            congestion_window_initial_bytes: 1 << 20,
            keep_alive: Duration::from_millis(500),
            idle_timeout: Duration::from_secs(3),
            uni_streams_max: 256,
            bi_streams_max: 64,
            accept_backlog: 64,
            socket_buffer_bytes: 4 << 20,
        }
    }
}

impl TransportOptions {
    /// Refuses combinations that could not work.
    pub(super) fn validate(&self) -> Result<(), QuicError> {
        let check = |good: bool, name, detail| {
            if good { Ok(()) } else { Err(QuicError::Options { name, detail }) }
        };
        check((MTU_MIN..=9000).contains(&self.mtu_initial), "mtu_initial", "1200 to 9000 bytes")?;
        check(
            (self.mtu_initial..=UDP_PAYLOAD_MAX).contains(&self.mtu_max),
            "mtu_max",
            "mtu_initial to 65507 bytes",
        )?;
        // A first flight larger than the congestion window would never be sent.
        check(
            self.congestion_window_initial_bytes >= 4 * u32::from(self.mtu_initial),
            "congestion_window_initial_bytes",
            "at least four datagrams",
        )?;
        let window_min = 64 << 10;
        check(self.receive_window_bytes >= window_min, "receive_window_bytes", "at least 64 KiB")?;
        check(self.stream_window_bytes >= window_min, "stream_window_bytes", "at least 64 KiB")?;
        check(self.send_window_bytes >= window_min, "send_window_bytes", "at least 64 KiB")?;
        check(
            self.idle_timeout >= self.keep_alive * 3 && self.idle_timeout <= Duration::from_secs(600),
            "idle_timeout",
            "three times keep_alive to 600 s",
        )?;
        check(self.keep_alive >= Duration::from_millis(10), "keep_alive", "at least 10 ms")?;
        check(self.accept_backlog >= 1, "accept_backlog", "at least 1")
    }

    /// The settings of one connection over a route with `route_mtu` bytes (`None`: unknown).
    pub(super) fn transport(&self, route_mtu: Option<u32>) -> Arc<TransportConfig> {
        let route = route_mtu
            .map_or(UDP_PAYLOAD_MAX, |mtu| u16::try_from(mtu.saturating_sub(HEADERS)).unwrap_or(u16::MAX))
            .clamp(MTU_MIN, UDP_PAYLOAD_MAX);
        let mut discovery = MtuDiscoveryConfig::default();
        discovery.upper_bound(self.mtu_max.min(route));
        // A path that swallows large packets after a re-route recovers sooner than by default.
        discovery.black_hole_cooldown(Duration::from_secs(10));

        let mut cubic = CubicConfig::default();
        cubic.initial_window(self.congestion_window_initial_bytes.into());

        let mut config = TransportConfig::default();
        config
            .initial_mtu(self.mtu_initial.min(route))
            .mtu_discovery_config(Some(discovery))
            .receive_window(self.receive_window_bytes.into())
            .stream_receive_window(self.stream_window_bytes.into())
            .send_window(self.send_window_bytes.into())
            .max_concurrent_uni_streams(self.uni_streams_max.into())
            .max_concurrent_bidi_streams(self.bi_streams_max.into())
            .keep_alive_interval(Some(self.keep_alive))
            .max_idle_timeout(Some(idle_timeout(self.idle_timeout)))
            .congestion_controller_factory(Arc::new(cubic))
            // Nothing here speaks in datagrams.
            .datagram_receive_buffer_size(None)
            .allow_spin(false);
        Arc::new(config)
    }
}

fn idle_timeout(duration: Duration) -> IdleTimeout {
    let millis = u32::try_from(duration.as_millis()).unwrap_or(u32::MAX);
    IdleTimeout::from(VarInt::from_u32(millis))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_valid_and_bad_combinations_are_named() {
        TransportOptions::default().validate().unwrap();
        let bad = [
            ("mtu_initial", TransportOptions { mtu_initial: 1100, ..Default::default() }),
            ("mtu_max", TransportOptions { mtu_max: 1400, ..Default::default() }),
            (
                "congestion_window_initial_bytes",
                TransportOptions { congestion_window_initial_bytes: 4000, ..Default::default() },
            ),
            ("idle_timeout", TransportOptions { idle_timeout: Duration::from_secs(1), ..Default::default() }),
            ("accept_backlog", TransportOptions { accept_backlog: 0, ..Default::default() }),
        ];
        for (expected, options) in bad {
            match options.validate() {
                Err(QuicError::Options { name, .. }) => assert_eq!(name, expected),
                other => panic!("{expected}: {other:?}"),
            }
        }
    }
}
