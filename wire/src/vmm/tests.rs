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
            kernel: "/k".to_owned(),
            initrd: Some("/i".to_owned()),
            cmdline: "quiet".to_owned(),
        },
        cpu: CpuProfile { name: "host".to_owned(), features: vec!["avx2".to_owned()], tsc_khz: 2_000_000 },
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
    ];
    let mut sums: Vec<_> = replies.map(|reply| sum(&FromVmm::Reply { seq: 1, reply })).to_vec();
    sums.push(sum(&FromVmm::Notice(Notice::GuestEnded(GuestEnd::PowerOff))));
    assert_eq!(sums, ANSWERS);
}

const REQUESTS: [(usize, u32); 16] = [
    (152, 0xc663_dae6),
    (160, 0x00dd_76cd),
    (152, 0xa560_36ff),
    (160, 0x98af_d7cb),
    (152, 0xa57f_4af3),
    (152, 0x0548_396a),
    (152, 0x2019_11f3),
    (152, 0xa3b0_7bf7),
    (152, 0x5ec4_4733),
    (152, 0x8f0c_30d5),
    (152, 0x7515_92b5),
    (152, 0x6e8a_2ca2),
    (152, 0x16d8_b4f8),
    (160, 0x3493_86ac),
    (152, 0xb020_f665),
    (152, 0x61aa_ec53),
];

const ANSWERS: [(usize, u32); 8] = [
    (232, 0x7218_ee6a),
    (232, 0x332f_011d),
    (232, 0xb173_05f7),
    (240, 0xc113_94f7),
    (232, 0xd675_7c49),
    (240, 0x3899_505e),
    (232, 0xdfb7_f87b),
    (232, 0x2e85_313a),
];
