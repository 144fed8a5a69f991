//! One incoming lane: QUIC to guest memory and disks.
//!
//! A batch is received whole, then checked and written in one step under its lane's lock. So halting the lanes needs to wait for
//! nobody: a batch is either in memory and counted, or it is not, and a lane of an attempt that is over finds that out
//! at its next batch.

use std::rc::Rc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use rkyv::util::AlignedVec;
use wire::fleet::RefusalCode;
use wire::frame::{FrameError, Header};
use wire::ids::{HostName, MigrationId};
use wire::migration::lane::{ArchivedBatch, ArchivedLaneRecord, LaneError, LaneReceiver, LaneRecord};
use wire::migration::messages::LanePoint;
use wire::migration::target::{TargetEvent, TargetOperation};
use wire::pages::{Lane, PageSet};

use super::target::Outside;
use crate::doorbell::Ringer;
use crate::memory::MachineMemory;
use crate::quic::{Connection, QuicError, RecvStream};
use crate::shard::ShardContext;
use crate::shard::stream::{self, StreamError};

/// Where the lanes of one migration go; shared by all shards.
pub struct LaneSink {
    migration: MigrationId,
    source: HostName,
    memory: Arc<MachineMemory>,
    session: Ringer<Outside>,
    lanes: Mutex<Lanes>,
}

/// Which lanes are read, and how far each one got over all attempts.
#[derive(Default)]
struct Lanes {
    /// The attempt whose lanes are read; 0 for none.
    attempt: u32,
    receivers: Vec<Arc<Mutex<Slot>>>,
}

struct Slot {
    attempt: u32,
    receiver: LaneReceiver,
    /// Pages of this lane that hold something: only those must be cleared to be zero.
    touched: PageSet,
}

impl LaneSink {
    /// For the migration of this machine; reads no lane yet.
    pub fn new(
        migration: MigrationId,
        source: HostName,
        memory: Arc<MachineMemory>,
        session: Ringer<Outside>,
    ) -> Self {
        Self { migration, source, memory, session, lanes: Mutex::default() }
    }

    /// The migration.
    pub fn migration(&self) -> MigrationId {
        self.migration
    }

    /// Reads the lanes of this attempt from here on.
    pub fn accept(&self, attempt: u32, count: u16) {
        let pages = self.memory.space.pages();
        let mut lanes = lock(&self.lanes);
        lanes.attempt = attempt;
        let first = u16::try_from(lanes.receivers.len()).unwrap_or(count);
        for lane in first..count {
            let receiver = LaneReceiver::new(Lane(lane), count, pages);
            lanes.receivers.push(Arc::new(Mutex::new(Slot {
                attempt,
                receiver,
                touched: PageSet::empty(pages),
            })));
        }
        for slot in &lanes.receivers {
            let mut slot = lock(slot);
            slot.attempt = attempt;
            slot.receiver.reconnected();
        }
    }

    /// Reads no lane any more; says how far each one got. When this returns, nothing more of them reaches memory.
    pub fn halt(&self) -> Vec<LanePoint> {
        let mut lanes = lock(&self.lanes);
        lanes.attempt = 0;
        let halted = |slot: &Arc<Mutex<Slot>>| {
            let mut slot = lock(slot);
            slot.attempt = 0;
            slot.receiver.point()
        };
        lanes.receivers.iter().map(halted).collect()
    }

    fn slot(&self, attempt: u32, lane: u16) -> Option<Arc<Mutex<Slot>>> {
        let lanes = lock(&self.lanes);
        if attempt == 0 || attempt != lanes.attempt {
            None
        } else {
            lanes.receivers.get(usize::from(lane)).cloned()
        }
    }

    fn tell(&self, event: TargetEvent) {
        let _session_gone = self.session.try_send(Outside::Event(event));
    }
}

/// Why a lane ended.
#[derive(Debug, thiserror::Error)]
enum ServeError {
    #[error(transparent)]
    Stream(#[from] StreamError),
    #[error(transparent)]
    Lane(#[from] LaneError),
    #[error("lane begins with something else than its opening")]
    NotOpened,
    #[error("lane opened twice")]
    Reopened,
    #[error("a disk of the machine cannot be written on this host: free some space, or choose another host")]
    Disk(#[source] std::io::Error),
}

impl From<FrameError> for ServeError {
    fn from(error: FrameError) -> Self {
        Self::Stream(error.into())
    }
}

impl From<QuicError> for ServeError {
    fn from(error: QuicError) -> Self {
        Self::Stream(error.into())
    }
}

/// Serves one incoming stream. A stream that belongs to no migration expected here ends its connection.
pub async fn serve(context: Rc<ShardContext>, connection: Connection, mut from: RecvStream) {
    let Ok((sink, slot, attempt, lane)) = opened(&context, &connection, &mut from).await else {
        return connection.close(1, "no lane is expected from you");
    };
    match receive(&sink, &slot, attempt, lane, &mut from).await {
        // The session learns of a lost link from its control stream, or soon by the idle timeout; a lane alone may be lost, too.
        Ok(()) | Err(ServeError::Stream(StreamError::Quic(_))) => {}
        Err(error) => {
            let code = if matches!(error, ServeError::Disk(_)) {
                RefusalCode::NoDisk
            } else {
                RefusalCode::Protocol
            };
            let (operation, detail) = (TargetOperation::Lanes, format!("{:#}", anyhow::Error::from(error)));
            sink.tell(TargetEvent::OperationFailed { operation, code, detail });
            connection.close(1, "lane broke its rules");
        }
    }
}

type Opened = (Arc<LaneSink>, Arc<Mutex<Slot>>, u32, u16);

async fn opened(
    context: &ShardContext,
    connection: &Connection,
    from: &mut RecvStream,
) -> Result<Opened, ServeError> {
    let record = stream::receive::<LaneRecord>(from).await?;
    let Some(LaneRecord::Open(open)) = record else { return Err(ServeError::NotOpened) };
    let sink = context.sinks.borrow().get(&open.migration).cloned();
    let sink =
        sink.filter(|sink| sink.source.as_str() == connection.peer_host()).ok_or(ServeError::NotOpened)?;
    let slot = sink.slot(open.attempt, open.lane).ok_or(ServeError::NotOpened)?;
    Ok((sink, slot, open.attempt, open.lane))
}

async fn receive(
    sink: &LaneSink,
    slot: &Mutex<Slot>,
    attempt: u32,
    lane: u16,
    from: &mut RecvStream,
) -> Result<(), ServeError> {
    let mut body = AlignedVec::new();
    let mut payload = Vec::new();
    while let Some(header) = stream::receive_head(from, &mut body).await? {
        read_payload(from, &header, &mut payload).await?;
        match header.access::<LaneRecord>(&body)? {
            ArchivedLaneRecord::Open(_) => return Err(ServeError::Reopened),
            ArchivedLaneRecord::Batch(batch) => {
                let mut slot = lock(slot);
                if slot.attempt != attempt {
                    return Ok(());
                }
                apply(&sink.memory, &mut slot, batch, header.payload_bytes, &payload)?;
            }
            ArchivedLaneRecord::RoundEnd(end) => {
                let mut slot = lock(slot);
                if slot.attempt != attempt {
                    return Ok(());
                }
                let (round, digest) = slot.receiver.round_end(end)?;
                drop(slot);
                sink.tell(TargetEvent::LaneRoundDone { lane, round, digest });
            }
        }
        glommio::executor().yield_now().await;
    }
    Ok(())
}

/// Reads the payload of a frame as the chunks it arrives in.
async fn read_payload(
    from: &mut RecvStream,
    header: &Header,
    into: &mut Vec<Bytes>,
) -> Result<(), ServeError> {
    into.clear();
    let mut left = header.payload_bytes as usize;
    while left > 0 {
        let chunk = from.read_chunk(left).await?.ok_or(QuicError::Ended { missing: left })?;
        left -= chunk.len();
        into.push(chunk);
    }
    Ok(())
}

/// Checks a batch and writes its pages.
fn apply(
    memory: &MachineMemory,
    slot: &mut Slot,
    batch: &ArchivedBatch,
    payload_bytes: u32,
    payload: &[Bytes],
) -> Result<(), ServeError> {
    let Slot { receiver, touched, .. } = slot;
    let checked = receiver.batch(batch, payload_bytes)?;
    let mut chunks = payload.iter();
    let mut current: &[u8] = &[];
    for run in checked.content() {
        touched.insert_run(run);
        let mut at = run.first.byte_offset();
        let end = run.end().byte_offset();
        while at < end {
            if current.is_empty() {
                let Some(next) = chunks.next() else { break };
                current = next;
            }
            let fits = usize::try_from(end - at).unwrap_or(usize::MAX).min(current.len());
            let (now, rest) = current.split_at(fits);
            memory.copy_in(at, now).map_err(ServeError::Disk)?;
            at += now.len() as u64;
            current = rest;
        }
    }
    for page in checked.zero().flat_map(|run| run.pages()) {
        memory.clear(page, touched.remove(page)).map_err(ServeError::Disk)?;
    }
    receiver.applied();
    Ok(())
}

/// What is locked is left whole by whoever panics: the last step of a batch is counting it.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// RAM fits the sets of pages kept here: 32 MiB of bits for each lane at the largest size, and as much for each disk of the largest size.
const _: () = assert!(wire::units::RAM_BYTES_MAX / wire::units::PAGE_BYTES <= 1 << 28);

#[cfg(test)]
mod tests {
    use super::*;
    use wire::migration::lane::{Batch, LaneSender, WireRun};
    use wire::units::RamSize;

    fn archive(record: &LaneRecord) -> AlignedVec {
        rkyv::to_bytes::<rkyv::rancor::Error>(record).unwrap()
    }

    fn apply_one(
        memory: &MachineMemory,
        slot: &mut Slot,
        batch: Batch,
        pages: &[&[u8]],
    ) -> Result<(), ServeError> {
        let bytes = archive(&LaneRecord::Batch(batch));
        let ArchivedLaneRecord::Batch(batch) =
            rkyv::access::<ArchivedLaneRecord, rkyv::rancor::Error>(&bytes).unwrap()
        else {
            unreachable!()
        };
        let payload: Vec<Bytes> = pages.iter().map(|p| Bytes::copy_from_slice(p)).collect();
        let length = pages.iter().map(|p| p.len()).sum::<usize>();
        apply(memory, slot, batch, u32::try_from(length).unwrap(), &payload)
    }

    #[test]
    fn pages_land_wherever_the_chunks_of_the_payload_end() {
        let ram = RamSize::from_bytes(16 << 20).unwrap();
        let memory = MachineMemory::create(ram).unwrap();
        let receiver = LaneReceiver::new(Lane(0), 1, ram.pages());
        let mut slot = Slot { attempt: 1, receiver, touched: PageSet::empty(ram.pages()) };
        let runs = vec![WireRun { first: 1, count: 1 }, WireRun { first: 7, count: 1 }];
        let batch = Batch { round: 1, content: runs, zero: vec![] };
        LaneSender::new().batch(&batch);
        apply_one(&memory, &mut slot, batch, &[&[1; 5000], &[2; 3192]]).unwrap();
        let mut page = [0; 4096];
        memory.ram.copy_out(wire::units::PageIndex(7), &mut page);
        assert_eq!((page[0], page[903], page[904], page[4095]), (1, 1, 2, 2));

        let zero = vec![WireRun { first: 2, count: 6 }];
        apply_one(&memory, &mut slot, Batch { round: 1, content: vec![], zero }, &[]).unwrap();
        memory.ram.copy_out(wire::units::PageIndex(7), &mut page);
        assert_eq!(page, [0; 4096]);

        let outside = vec![WireRun { first: 4096, count: 1 }];
        let refused =
            apply_one(&memory, &mut slot, Batch { round: 1, content: outside, zero: vec![] }, &[&[1; 4096]]);
        assert!(matches!(refused, Err(ServeError::Lane(LaneError::Run { .. }))));
    }
}
