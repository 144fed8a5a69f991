//! The bytes of each message are a promise: a restarted `mashined` may be newer than the VMM it adopts. When this test fails, raise
//! [`VERSION`] instead of the sums.

use super::*;
use crate::frame;
use crate::frame::Message;

fn spec() -> MachineSpec {
    MachineSpec {
        id: MachineId::from_u64(7),
        name: "web".parse().unwrap(),
        vcpus: 2,
        ram: RamSize::from_bytes(1 << 30).unwrap(),
        mac: [2, 1, 2, 3, 4, 5],
        ip4: [198, 19, 0, 2],
        ip6: [0x20; 16],
        boot: BootSpec {
            kernel: FileRef::Path("/k".to_owned()),
            initrd: Some(FileRef::Blob(Digest([9; 32]))),
            cmdline: "quiet".to_owned(),
            guest_config: b"{}".to_vec(),
        },
        cpu: CpuProfile { name: "host".to_owned(), features: vec!["avx2".to_owned()], tsc_khz: 2_000_000 },
        disks: vec![DiskSpec {
            name: "root".parse().unwrap(),
            size: DiskSize::from_bytes(64 << 20).unwrap(),
            base: Some(Digest([7; 32])),
        }],
    }
}

fn record() -> Disowned {
    Disowned { epoch: Epoch(3), migration: MigrationId::from_u64(9), target: "host-b".parse().unwrap() }
}

/// Length of the frame, and the checksum of all of it.
fn sum<M: Message>(message: &M) -> (usize, u32) {
    let bytes = frame::encode(VERSION, message, 0).unwrap();
    let (version, _) = frame::decode_whole::<M>(&bytes).unwrap();
    assert_eq!(version, VERSION);
    (bytes.len(), crc32c::crc32c(&bytes))
}

#[test]
fn golden_requests() {
    let requests = [
        Request::Hello { version: 1 },
        Request::Create(spec()),
        Request::Boot { initrd: true, cmdline: "quiet".to_owned() },
        Request::Restore(vec![1, 2, 3]),
        Request::Run { epoch: Epoch(2) },
        Request::Pause { harvest: true },
        Request::Save,
        Request::DirtyLog { on: true },
        Request::DirtySync,
        Request::DirtyTake { first: PageIndex(64), count: 512 },
        Request::Disown(record()),
        Request::Reclaim { epoch: Epoch(4) },
        Request::Describe,
        Request::SerialInput(b"ls\n".to_vec()),
        Request::Quit,
        Request::PowerButton,
        Request::BalloonStats,
    ];
    let sums: Vec<_> = requests.map(|request| sum(&ToVmm { seq: 1, request })).to_vec();
    assert_eq!(sums, REQUESTS);
}

#[test]
fn golden_answers() {
    let replies = [
        Reply::Hello { version: 1, phase: Phase::Running },
        Reply::Done,
        Reply::Paused { stop_us: 1, harvest_us: 2, dirty_pages: 3 },
        Reply::State(vec![1, 2, 3]),
        Reply::Dirty { pages: 5 },
        Reply::Description {
            spec: Some(spec()),
            phase: Phase::Disowned,
            epoch: Epoch(3),
            disowned: Some(record()),
            dirty_log: true,
            ended: Some(GuestEnd::Crash("why".to_owned())),
        },
        Reply::Refused { code: Code::StaleEpoch, detail: "no".to_owned() },
        Reply::Balloon(BalloonReport { free_bytes: Some(7), ..BalloonReport::default() }),
    ];
    let mut sums: Vec<_> = replies.map(|reply| sum(&FromVmm::Reply { seq: 1, reply })).to_vec();
    sums.push(sum(&FromVmm::Notice(Notice::GuestEnded(GuestEnd::PowerOff))));
    assert_eq!(sums, ANSWERS);
}

const REQUESTS: [(usize, u32); 17] = [
    (224, 0x42cb_aac4),
    (296, 0x999b_f076),
    (224, 0x516f_3474),
    (232, 0x8105_ecab),
    (224, 0xb081_78ad),
    (224, 0x87c2_4abd),
    (224, 0xe9e9_19bf),
    (224, 0x046c_d4c1),
    (224, 0x6d94_59d8),
    (224, 0x39da_aa89),
    (224, 0x3872_499a),
    (224, 0x1f8c_00b7),
    (224, 0x6f25_13d1),
    (232, 0x2392_b6c2),
    (224, 0xec8b_8dad),
    (224, 0xad5c_c293),
    (224, 0x6233_e5ee),
];

const ANSWERS: [(usize, u32); 9] = [
    (304, 0xa088_28b1),
    (304, 0x7371_fc94),
    (304, 0x3ebc_529b),
    (312, 0x26d8_1176),
    (304, 0x9716_acbe),
    (376, 0x1d10_cfb0),
    (304, 0xfe35_6118),
    (304, 0x5838_b3a7),
    (304, 0xabdf_83cd),
];
