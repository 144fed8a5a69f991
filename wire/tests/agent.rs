//! Both ends of a session against each other, over connections that break anywhere: every byte arrives once, in order, every signal
//! once, and neither end keeps more than its window.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::VecDeque;

use proptest::prelude::*;
use wire::agent::{
    AgentSession, CHUNK_BYTES, ClientSession, DETACHED_US_MAX, Demand, Ended, Exec, ExitStatus, FailCode,
    FromAgent, HANGUP_GRACE_US, News, Reap, SessionId, Stream, Task, ToAgent, Violation, WINDOW_BYTES,
};
use wire::units::Instant;

const ID: SessionId = SessionId([7; 16]);

fn pattern(seed: u8, from: usize, count: usize) -> Vec<u8> {
    (from..from + count).map(|n| (n % 251).to_le_bytes()[0] ^ seed).collect()
}

/// Two ends, what is under way between them, and what came out.
struct World {
    client: ClientSession,
    agent: Option<AgentSession>,
    up: VecDeque<ToAgent>,
    down: VecDeque<FromAgent>,
    connected: bool,
    typed: usize,
    printed: [usize; 2],
    /// Given to the program but not yet read by it, and read.
    pipe: usize,
    read: Vec<u8>,
    input_ended: bool,
    shown: [Vec<u8>; 2],
    undelivered: [usize; 2],
    signalled: Vec<u8>,
    seen_signals: Vec<u8>,
}

#[derive(Debug, Clone)]
enum Step {
    Connect,
    Cut,
    Up(u8),
    Down(u8),
    Type(usize),
    Print(Stream, usize),
    Read(usize),
    Show(Stream, usize),
    Signal(u8),
}

impl World {
    fn new() -> Self {
        let task = Task::Exec(Exec { argv: vec![b"cat".to_vec()], stdin: true, ..Exec::default() });
        Self {
            client: ClientSession::new(ID, task),
            agent: None,
            up: VecDeque::new(),
            down: VecDeque::new(),
            connected: false,
            typed: 0,
            printed: [0; 2],
            pipe: 0,
            read: Vec::new(),
            input_ended: false,
            shown: [Vec::new(), Vec::new()],
            undelivered: [0; 2],
            signalled: Vec::new(),
            seen_signals: Vec::new(),
        }
    }

    fn cut(&mut self) {
        self.connected = false;
        self.up.clear();
        self.down.clear();
        self.client.disconnected();
        if let Some(agent) = &mut self.agent {
            agent.detach(Instant(0));
        }
    }

    /// The client's next message, on its way or arriving.
    fn up(&mut self) {
        if let Some(message) = self.connected.then(|| self.client.next_message()).flatten() {
            self.up.push_back(message);
        }
    }

    fn arrive_up(&mut self) {
        let Some(message) = self.up.pop_front() else { return };
        let received = match message {
            ToAgent::Open { .. } => [0; 2],
            ToAgent::Resume { received, .. } => received,
            other => {
                match self.agent.as_mut().unwrap().handle(other).unwrap() {
                    Some(Demand::Write(bytes)) => {
                        self.pipe += bytes.len();
                        self.read.extend(bytes);
                    }
                    Some(Demand::EndInput) => self.input_ended = true,
                    Some(Demand::Signal(number)) => self.seen_signals.push(number),
                    _ => {}
                }
                return;
            }
        };
        let agent = self.agent.get_or_insert_with(|| AgentSession::new(Instant(0)));
        agent.attach(received).unwrap();
    }

    fn down(&mut self) {
        if let Some(message) =
            self.connected.then(|| self.agent.as_mut().and_then(AgentSession::next_message)).flatten()
        {
            self.down.push_back(message);
        }
    }

    fn arrive_down(&mut self) {
        let Some(message) = self.down.pop_front() else { return };
        if let Some(News::Output(stream, bytes)) = self.client.handle(message).unwrap() {
            self.undelivered[stream.index()] += bytes.len();
            self.shown[stream.index()].extend(bytes);
        }
    }

    fn show(&mut self, stream: Stream, bytes: usize) {
        let bytes = bytes.min(self.undelivered[stream.index()]);
        self.undelivered[stream.index()] -= bytes;
        self.client.delivered(stream, bytes);
    }

    fn read(&mut self, bytes: usize) {
        let bytes = bytes.min(self.pipe);
        self.pipe -= bytes;
        if let Some(agent) = &mut self.agent {
            agent.input_written(bytes);
        }
    }

    fn take(&mut self, step: &Step) {
        match *step {
            Step::Connect if !self.connected => {
                self.connected = true;
                self.client.connected();
            }
            Step::Connect => {}
            Step::Cut => self.cut(),
            Step::Up(arrive) => {
                self.up();
                (0..arrive).for_each(|_| self.arrive_up());
            }
            Step::Down(arrive) => {
                self.down();
                (0..arrive).for_each(|_| self.arrive_down());
            }
            Step::Type(count) => {
                let count = count.min(self.client.room());
                self.client.push(&pattern(1, self.typed, count));
                self.typed += count;
            }
            Step::Print(stream, count) => {
                let Some(agent) = &mut self.agent else { return };
                let printed = &mut self.printed[stream.index()];
                let count = count.min(agent.room(stream));
                agent.push(stream, &pattern(2, *printed, count));
                *printed += count;
            }
            Step::Read(bytes) => self.read(bytes),
            Step::Show(stream, bytes) => self.show(stream, bytes),
            Step::Signal(number) => {
                if self.client.signal(number) {
                    self.signalled.push(number);
                }
            }
        }
        assert!(self.pipe <= WINDOW_BYTES, "input beyond the window");
        assert!(self.undelivered.iter().all(|&bytes| bytes <= WINDOW_BYTES), "output beyond the window");
    }

    /// A good connection until the session has ended.
    fn finish(&mut self) {
        self.cut();
        self.take(&Step::Connect);
        self.client.end_input();
        for _ in 0..10_000 {
            self.up();
            self.arrive_up();
            self.down();
            self.arrive_down();
            self.read(WINDOW_BYTES);
            self.show(Stream::Out, WINDOW_BYTES);
            self.show(Stream::Err, WINDOW_BYTES);
            if let Some(agent) = self.agent.as_mut().filter(|agent| self.input_ended && !agent.has_exited()) {
                agent.end_output(Stream::Out);
                agent.end_output(Stream::Err);
                agent.exited(ExitStatus::Code(3));
            }
            if self.client.ended().is_some() {
                return;
            }
        }
        panic!("the session does not end");
    }
}

fn step() -> impl Strategy<Value = Step> {
    let stream = prop_oneof![Just(Stream::Out), Just(Stream::Err)];
    let bytes = prop_oneof![0..50usize, 0..100_000usize];
    prop_oneof![
        3 => Just(Step::Connect),
        1 => Just(Step::Cut),
        6 => (0..3u8).prop_map(Step::Up),
        6 => (0..3u8).prop_map(Step::Down),
        2 => bytes.clone().prop_map(Step::Type),
        3 => (stream.clone(), bytes.clone()).prop_map(|(stream, bytes)| Step::Print(stream, bytes)),
        2 => bytes.clone().prop_map(Step::Read),
        2 => (stream, bytes).prop_map(|(stream, bytes)| Step::Show(stream, bytes)),
        1 => (1..32u8).prop_map(Step::Signal),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn nothing_is_lost_or_doubled(steps in proptest::collection::vec(step(), 0..400)) {
        let mut world = World::new();
        for step in &steps {
            world.take(step);
        }
        world.finish();
        prop_assert_eq!(world.client.ended(), Some(&Ended::Exited(ExitStatus::Code(3))));
        prop_assert!(world.read == pattern(1, 0, world.typed), "input");
        for stream in Stream::ALL {
            let all = pattern(2, 0, world.printed[stream.index()]);
            prop_assert!(world.shown[stream.index()] == all, "{:?}", stream);
        }
        prop_assert_eq!(world.seen_signals, world.signalled);
    }
}

#[test]
fn a_session_that_nobody_takes_up_is_hung_up_and_then_killed() {
    let mut agent = AgentSession::new(Instant(5));
    let hangup = Instant(5).plus_us(DETACHED_US_MAX);
    assert_eq!(agent.reap(Instant(6)), None);
    assert_eq!(agent.reap(hangup), Some(Reap::Hangup));
    assert_eq!(agent.reap(hangup), None);
    assert_eq!(agent.reap(hangup.plus_us(HANGUP_GRACE_US)), Some(Reap::Kill));
    agent.attach([0; 2]).unwrap();
    assert_eq!((agent.deadline(), agent.reap(Instant(u64::MAX))), (None, None));
}

#[test]
fn messages_where_they_do_not_belong_end_the_connection() {
    let mut agent = AgentSession::new(Instant(0));
    agent.attach([0; 2]).unwrap();
    assert!(agent.attach([1, 0]).is_err(), "output that was never sent");
    let violations = [
        ToAgent::Open { session: ID, task: Task::Exec(Exec::default()) },
        ToAgent::Input { offset: 1, bytes: vec![1] },
        ToAgent::InputEnd { offset: 1 },
        ToAgent::Ack { stream: Stream::Out, offset: 1 },
        ToAgent::Signal { sequence: 2, number: 1 },
    ];
    for message in violations {
        assert!(agent.handle(message.clone()).is_err(), "{message:?}");
    }
    let mut client = ClientSession::new(ID, Task::Exec(Exec::default()));
    assert!(client.handle(FromAgent::Done).is_err(), "offline");
    client.connected();
    client.next_message().unwrap();
    assert!(client.handle(FromAgent::Opened { input_received: 1, signals_received: 0 }).is_err());
    assert!(client.handle(FromAgent::InputAck { offset: 0 }).is_err(), "before Opened");
    client.handle(FromAgent::Opened { input_received: 0, signals_received: 0 }).unwrap();
    let early = FromAgent::Exited { status: ExitStatus::Code(0), ends: [1, 0] };
    assert_eq!(client.handle(early), Err(Violation::Gap { offset: 1, expected: 0 }));
    let gone = FromAgent::Failed { code: FailCode::NoSuchSession, detail: String::new() };
    assert!(matches!(client.handle(gone), Ok(Some(News::Ended(Ended::Failed { .. })))));
}

#[test]
fn after_exited_the_agent_says_nothing_more() {
    let mut agent = AgentSession::new(Instant(0));
    agent.attach([0; 2]).unwrap();
    for stream in Stream::ALL {
        agent.end_output(stream);
    }
    agent.exited(ExitStatus::Code(0));
    assert!(matches!(agent.next_message(), Some(FromAgent::Opened { .. })));
    assert!(matches!(agent.next_message(), Some(FromAgent::Exited { .. })));
    // Typed before the client knew of the end.
    agent.handle(ToAgent::Input { offset: 0, bytes: vec![0; CHUNK_BYTES] }).unwrap();
    agent.input_written(CHUNK_BYTES);
    agent.handle(ToAgent::Signal { sequence: 1, number: 15 }).unwrap();
    assert_eq!(agent.next_message(), None);
}
