//! Choices made from bytes: messages and events, mostly near what is expected.

use wire::fleet::RefusalCode;
use wire::ids::{Epoch, MachineId, MigrationId};
use wire::migration::messages::{
    Accept, Commit, ConsoleBytes, Final, LanePoint, Offer, Resume, Running, SourceMessage, TargetMessage,
    VERSION, VERSIONS, VersionRange,
};
use wire::migration::source::{Sent, SourceEvent, SourceOperation};
use wire::migration::target::{TargetEvent, TargetOperation};
use wire::units::RamSize;
use wire::vmm::{BootSpec, CpuProfile, FileRef, MachineSpec};

pub const MIGRATION: MigrationId = MigrationId::from_u64(1);
pub const EPOCH: Epoch = Epoch(3);
pub const TO_EPOCH: Epoch = Epoch(4);

/// Bytes as choices; zeros when they run out.
pub struct Input<'a>(pub &'a [u8]);

impl<'a> Input<'a> {
    pub fn take(&mut self, most: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(most.min(self.0.len()));
        self.0 = rest;
        taken
    }

    pub fn byte(&mut self) -> u8 {
        self.take(1).first().copied().unwrap_or(0)
    }

    /// Small numbers mostly, so that rounds and attempts meet; sometimes huge.
    fn number(&mut self) -> u64 {
        match self.byte() {
            255 => u64::MAX,
            254 => u64::from(self.byte()) << 40,
            small => u64::from(small % 8),
        }
    }

    fn number32(&mut self) -> u32 {
        u32::try_from(self.number()).unwrap_or(u32::MAX)
    }

    fn number16(&mut self) -> u16 {
        u16::try_from(self.number()).unwrap_or(u16::MAX)
    }

    pub fn bytes(&mut self) -> Vec<u8> {
        let length = usize::from(self.byte() % 16);
        self.take(length).to_vec()
    }

    fn console(&mut self) -> ConsoleBytes {
        ConsoleBytes { offset: self.number(), bytes: self.bytes() }
    }

    /// The value expected, mostly.
    pub fn near<T>(&mut self, value: T, other: impl FnOnce(&mut Self) -> T) -> T {
        if self.byte().is_multiple_of(8) { other(self) } else { value }
    }

    fn text(&mut self) -> String {
        String::from_utf8_lossy(&self.bytes()).into_owned()
    }
}

pub fn spec() -> MachineSpec {
    MachineSpec {
        id: MachineId::from_u64(7),
        name: "m".parse().expect("a label"),
        vcpus: 1,
        ram: RamSize::from_bytes(16 << 20).expect("a literal size"),
        mac: [2; 6],
        ip4: [198, 19, 0, 2],
        ip6: [0; 16],
        boot: BootSpec {
            kernel: FileRef::Path(String::new()),
            initrd: None,
            cmdline: String::new(),
            guest_config: Vec::new(),
        },
        cpu: CpuProfile { name: String::new(), features: Vec::new(), tsc_khz: 0 },
        disks: Vec::new(),
    }
}

fn versions(input: &mut Input<'_>) -> VersionRange {
    input.near(VERSIONS, |i| VersionRange { oldest: i.number16(), newest: i.number16() })
}

fn source_message(input: &mut Input<'_>) -> SourceMessage {
    let migration = |i: &mut Input<'_>| i.near(MIGRATION, |i| MigrationId::from_u64(i.number()));
    match input.byte() % 10 {
        0..=2 => SourceMessage::Offer(Box::new(Offer {
            versions: versions(input),
            state_versions: versions(input),
            migration: migration(input),
            incarnation: input.near(0, Input::number),
            epoch: input.near(EPOCH, |i| Epoch(i.number())),
            to_epoch: input.near(TO_EPOCH, |i| Epoch(i.number())),
            lanes: input.near(2, Input::number16),
            ..offer(input.number32())
        })),
        3 => SourceMessage::Console(input.console()),
        4 | 5 => SourceMessage::Final(Final {
            round: input.number32(),
            state: input.bytes(),
            console: input.console(),
        }),
        6 | 7 => SourceMessage::Commit(Commit {
            migration: migration(input),
            epoch: input.near(TO_EPOCH, |i| Epoch(i.number())),
            attempt: input.number32(),
        }),
        8 => input.near(SourceMessage::Finished, |_| SourceMessage::Cancel),
        _ => SourceMessage::Abort { code: RefusalCode::Protocol, detail: input.text() },
    }
}

pub fn target_event(input: &mut Input<'_>) -> TargetEvent {
    let session = u64::from(input.byte() % 3);
    match input.byte() % 20 {
        0 => TargetEvent::Start,
        1..=6 => TargetEvent::Message { session, message: source_message(input) },
        7 => TargetEvent::LinkLost { session },
        8 => TargetEvent::Reserved,
        9 => {
            let lanes = (0..input.byte() % 5)
                .map(|_| LanePoint { round: input.number32(), batches: input.number32() })
                .collect();
            TargetEvent::LanesHalted { lanes }
        }
        10..=12 => TargetEvent::LaneRoundDone {
            lane: input.number16(),
            round: input.number32(),
            digest: input.number32(),
        },
        13 => TargetEvent::StateLoaded { round: input.number32(), us: input.number() },
        14 => TargetEvent::RouteInstalled { round: input.number32() },
        15 => input.near(TargetEvent::Running { us: 1 }, |_| TargetEvent::GuestEnded),
        16 => TargetEvent::Discarded,
        17 => {
            let operation = match input.byte() % 5 {
                0 => TargetOperation::Reserve,
                1 => TargetOperation::Lanes,
                2 => TargetOperation::LoadState,
                3 => TargetOperation::InstallRoute,
                _ => TargetOperation::Run,
            };
            TargetEvent::OperationFailed { operation, code: RefusalCode::HostError, detail: input.text() }
        }
        18 => input.near(TargetEvent::Timer, |_| TargetEvent::Forget),
        _ => input.near(TargetEvent::Timer, |i| TargetEvent::Fence { epoch: Epoch(i.number()) }),
    }
}

fn target_message(input: &mut Input<'_>, attempt: u32) -> TargetMessage {
    match input.byte() % 9 {
        0..=2 => {
            let resume = input.byte().is_multiple_of(2).then(|| Resume {
                round: input.number32(),
                lanes: (0..input.byte() % 5)
                    .map(|_| LanePoint { round: input.number32(), batches: input.number32() })
                    .collect(),
                console_end: input.number(),
            });
            TargetMessage::Accept(Accept {
                version: input.near(VERSION, Input::number16),
                state_version: input.near(1, Input::number16),
                attempt: input.near(attempt, Input::number32),
                lanes: input.near(2, Input::number16),
                resume,
            })
        }
        3 => TargetMessage::Refuse { code: RefusalCode::NoRam, detail: input.text() },
        4 | 5 => TargetMessage::RoundReceived { round: input.number32() },
        6 => TargetMessage::Ready {
            round: input.number32(),
            // Now and then what the source expects: no lane carried anything, and the state is empty.
            digest: input.near(
                wire::migration::lane::ready_digest(2, [], wire::migration::lane::state_digest(&[])),
                Input::number32,
            ),
        },
        7 => TargetMessage::Running(Running {
            epoch: input.near(TO_EPOCH, |i| Epoch(i.number())),
            restore_us: input.number(),
            resume_us: input.number(),
        }),
        _ => TargetMessage::Abort { code: RefusalCode::Protocol, detail: input.text() },
    }
}

pub fn source_event(input: &mut Input<'_>, newest: u32) -> SourceEvent {
    let attempt = input.near(newest, Input::number32);
    match input.byte() % 24 {
        0 => SourceEvent::Start,
        1 | 2 => SourceEvent::Connected { attempt },
        3 => SourceEvent::LinkLost { attempt },
        4..=9 => SourceEvent::Message { attempt, message: target_message(input, newest) },
        10 => SourceEvent::DirtyLogStarted,
        11 => SourceEvent::RoundSent(Sent {
            round: input.number32(),
            pages: input.number(),
            zero_pages: input.number(),
            bytes: input.number(),
            us: input.number(),
        }),
        12 => SourceEvent::Dirty { round: input.number32(), pages: input.number() },
        13 => SourceEvent::ConsoleRead(input.console()),
        14 => SourceEvent::Paused { stop_us: input.number(), harvest_us: 1, dirty_pages: input.number() },
        15 => {
            let sent = Sent { round: input.number32(), ..Sent::default() };
            SourceEvent::FinalSent { sent, lane_digests: Vec::new() }
        }
        16 => SourceEvent::Saved {
            state: input.near(Vec::new(), Input::bytes),
            console: input.console(),
            us: input.number(),
        },
        17 => SourceEvent::Disowned,
        18 => SourceEvent::Resumed,
        19 => input.near(SourceEvent::Released, |_| SourceEvent::Reclaimed),
        20 => {
            let operation = match input.byte() % 7 {
                0 => SourceOperation::StartDirtyLog,
                1 => SourceOperation::Send,
                2 => SourceOperation::Pause,
                3 => SourceOperation::Save,
                4 => SourceOperation::Disown,
                5 => SourceOperation::ResumeGuest,
                _ => SourceOperation::Reclaim,
            };
            SourceEvent::OperationFailed { operation, detail: input.text() }
        }
        21 => input.near(SourceEvent::Timer, |_| SourceEvent::GuestEnded),
        22 => input.near(SourceEvent::Timer, |_| SourceEvent::Cancel),
        _ => match input.byte() % 2 {
            0 => SourceEvent::Reclaim { epoch: Epoch(input.number()) },
            _ => SourceEvent::TargetOwns { epoch: input.near(TO_EPOCH, |i| Epoch(i.number())) },
        },
    }
}

/// The offer that the target expects.
pub fn offer(attempt: u32) -> Offer {
    Offer {
        versions: VERSIONS,
        state_versions: VersionRange { oldest: 1, newest: 1 },
        migration: MIGRATION,
        attempt,
        incarnation: 0,
        spec: spec(),
        epoch: EPOCH,
        to_epoch: TO_EPOCH,
        lanes: 2,
        source: "a".parse().expect("a label"),
        downtime_budget_us: 10_000,
    }
}
