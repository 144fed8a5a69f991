//! What the fuzz targets run, shared with the plain tests so that it runs without a nightly compiler, too. Each body takes
//! any bytes, must not panic, must not use memory beyond the size of its input and the stated caps, and checks what has to
//! hold even with a hostile peer.

mod honest;
mod input;
pub mod sessions;

use honest::{HonestSource, HonestTarget};
use input::{EPOCH, Input, MIGRATION, TO_EPOCH, source_event, spec, target_event};
use rkyv::rancor;
use rkyv::util::AlignedVec;
use wire::agent::{FromAgent, ToAgent};
use wire::fleet::{FromHost, ToHost};
use wire::frame::{self, HEADER_BYTES, Header, Message};
use wire::migration::lane::{ArchivedLaneRecord, LaneReceiver, LaneRecord};
use wire::migration::messages::{SourceMessage, TargetMessage};
use wire::migration::source::{self, Source, SourceAction, SourceConfig, SourceEvent};
use wire::migration::target::{self, Target, TargetAction, TargetConfig, TargetEvent};
use wire::pages::Lane;
use wire::units::{Instant, RamSize};
use wire::vmm::{FromVmm, ToVmm};

/// Any bytes as any frame.
pub fn frames(data: &[u8]) {
    fn whole<M: Message + PartialEq + std::fmt::Debug>(data: &[u8]) {
        if let Ok((version, message)) = frame::decode_whole::<M>(data) {
            // What was taken can be said again, and means the same.
            let again = frame::encode(version, &message, 0).expect("it fitted before");
            assert_eq!(frame::decode_whole::<M>(&again).expect("our own"), (version, message));
        }
        let _ = frame::io::read::<M>(&mut { data });
    }
    whole::<SourceMessage>(data);
    whole::<TargetMessage>(data);
    whole::<LaneRecord>(data);
    whole::<ToVmm>(data);
    whole::<FromVmm>(data);
    whole::<ToHost>(data);
    whole::<FromHost>(data);
    whole::<ToAgent>(data);
    whole::<FromAgent>(data);
    if let Some(fixed) = data.first_chunk::<HEADER_BYTES>()
        && let Ok(header) = Header::parse(fixed)
    {
        assert!(header.body_bytes <= header.kind.body_bytes_max());
        assert!(header.payload_bytes <= header.kind.payload_bytes_max());
    }
}

/// Any bytes as records of a lane: what comes through the check can be written to memory without another look.
pub fn lanes(data: &[u8]) {
    let mut input = Input(data);
    let ram = RamSize::from_bytes(16 << 20).expect("a literal size");
    let lanes = u16::from(input.byte() % 4) + 1;
    let lane = u16::from(input.byte()) % lanes;
    let mut receiver = LaneReceiver::new(Lane(lane), lanes, ram.pages());
    let mut before = receiver.point();
    while !input.0.is_empty() {
        let payload = u32::from(input.byte()) * 4096;
        let length = usize::from(input.byte());
        let mut body = AlignedVec::<16>::new();
        body.extend_from_slice(input.take(length));
        match rkyv::access::<ArchivedLaneRecord, rancor::Error>(&body) {
            Ok(ArchivedLaneRecord::Batch(batch)) => {
                let Ok(checked) = receiver.batch(batch, payload) else { continue };
                let mut behind = 0;
                for run in checked.content() {
                    assert!(run.count > 0 && run.first.0 >= behind && run.end().0 <= ram.pages());
                    assert_eq!(wire::pages::lane_of(run.first.chunk(), lanes), Lane(lane));
                    assert!(checked.zero().all(|zero| zero.end() <= run.first || run.end() <= zero.first));
                    behind = run.end().0;
                }
                assert_eq!(checked.content().map(|run| run.count).sum::<u64>() * 4096, u64::from(payload));
                receiver.applied();
            }
            Ok(ArchivedLaneRecord::RoundEnd(end)) => {
                let _ = receiver.round_end(end);
            }
            _ => {}
        }
        assert!(receiver.point() >= before, "a lane never goes back");
        before = receiver.point();
    }
}

/// A hostile source, and a host whose answers come in any order: the target never runs the machine but on a proper Commit
/// after it was ready, never after it began to drop it, and never twice. Returns whether it came to own the machine.
pub fn target(data: &[u8]) -> bool {
    let mut input = Input(data);
    let config = TargetConfig::new(MIGRATION, spec(), TO_EPOCH, "a".parse().expect("a label"), 4);
    let mut target = Target::new(config);
    let (mut out, mut now) = (Vec::with_capacity(target::ACTIONS_MAX), 0);
    let (mut runs, mut dropping, mut ready) = (0, false, false);
    let mut honest = HonestSource::new();
    while !input.0.is_empty() {
        now += u64::from(input.byte()) << (input.byte() % 20);
        // Mostly what an honest source and host would do next, so that deep states are reached.
        let next = if input.byte() % 4 > 0 { honest.next() } else { None };
        let event = next.unwrap_or_else(|| target_event(&mut input));
        let before = target.state_name();
        let commits = matches!(&event, TargetEvent::Message { message: SourceMessage::Commit(c), .. }
            if c.migration == MIGRATION && c.epoch == TO_EPOCH);
        out.clear();
        let _ = target.handle(Instant(now), event, &mut out);
        assert!(out.len() <= target::ACTIONS_MAX, "{} actions", out.len());
        for action in &out {
            match action {
                TargetAction::Run { epoch } => {
                    assert!(*epoch == TO_EPOCH && commits && ready && before == "Ready" && !dropping);
                    runs += 1;
                }
                TargetAction::Discard => dropping = true,
                TargetAction::Fenced { epoch } if *epoch >= TO_EPOCH => {
                    assert!(matches!(target.state_name(), "Gone"), "fenced in {}", target.state_name());
                }
                TargetAction::Send { message: TargetMessage::Ready { .. }, .. } => ready = true,
                _ => {}
            }
        }
        honest.saw(&out);
        assert!(runs <= 1);
        assert!(!(dropping && target.owns()), "dropped and owned");
    }
    target.owns()
}

/// A hostile target, and a host whose answers come in any order: the source gives nothing away but with its own VMM's word,
/// and afterwards never resumes the guest by itself. Returns whether it gave the machine away.
pub fn source(data: &[u8]) -> bool {
    let mut input = Input(data);
    let hosts = ("a".parse().expect("a label"), "b".parse().expect("a label"));
    let config = SourceConfig::new(MIGRATION, spec(), (EPOCH, TO_EPOCH), hosts, 2);
    let mut source = Source::new(config);
    let (mut out, mut now) = (Vec::with_capacity(source::ACTIONS_MAX), 0);
    let (mut asked, mut given_away, mut ended) = (false, false, false);
    let mut honest = HonestTarget::new();
    while !input.0.is_empty() {
        now += u64::from(input.byte()) << (input.byte() % 20);
        let next = if input.byte() % 4 > 0 { honest.next() } else { None };
        let event = next.unwrap_or_else(|| source_event(&mut input, source.attempt()));
        let vmm_said = matches!(event, SourceEvent::Disowned | SourceEvent::GuestEnded);
        let reclaim = matches!(event, SourceEvent::Reclaim { epoch } if epoch > TO_EPOCH);
        let before = source.state_name();
        out.clear();
        let _ = source.handle(Instant(now), event, &mut out);
        assert!(out.len() <= source::ACTIONS_MAX, "{} actions", out.len());
        given_away |= before == "Disowning" && vmm_said && source.in_doubt();
        for action in &out {
            match action {
                SourceAction::Disown { .. } => asked = true,
                SourceAction::Send(SourceMessage::Commit(_)) => assert!(asked && given_away),
                SourceAction::ResumeGuest { epoch } => assert!(!given_away && *epoch == EPOCH),
                SourceAction::Reclaim { epoch } => assert!(given_away && reclaim && *epoch > TO_EPOCH),
                SourceAction::Release => assert!(given_away),
                SourceAction::Done(_) => {
                    assert!(!ended, "ended twice");
                    ended = true;
                }
                _ => {}
            }
        }
        honest.saw(source.attempt(), &out);
        assert_eq!(source.ended(), ended);
        let _ = source.progress(Instant(now));
    }
    given_away
}
