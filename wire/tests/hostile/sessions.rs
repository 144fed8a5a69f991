//! Sessions of the guest's agent with a hostile other end.

use wire::agent::{
    AgentSession, ClientSession, Demand, Exec, ExitStatus, FailCode, FromAgent, News, SessionId, Stream,
    Task, ToAgent, WINDOW_BYTES,
};
use wire::units::Instant;

use super::input::Input;

/// Offsets near what is expected, and far away.
fn offset(input: &mut Input<'_>, near: u64) -> u64 {
    match input.byte() % 8 {
        0 => u64::MAX,
        1 => near.wrapping_sub(u64::from(input.byte())),
        2 => near.wrapping_add(u64::from(input.byte())),
        _ => near,
    }
}

fn stream(input: &mut Input<'_>) -> Stream {
    Stream::ALL[usize::from(input.byte() % 2)]
}

fn piece(input: &mut Input<'_>) -> Vec<u8> {
    vec![7; usize::from(input.byte()) << (input.byte() % 8)]
}

/// A hostile client: what it makes the agent hold is bounded, and nothing is given to the program twice. Returns how much was given.
pub fn agent(data: &[u8]) -> u64 {
    let mut input = Input(data);
    let mut session = AgentSession::new(Instant(0));
    let (mut given, mut written, mut printed) = (0u64, 0u64, 0u64);
    while !input.0.is_empty() {
        let message = match input.byte() % 12 {
            0..=2 => ToAgent::Input { offset: offset(&mut input, given), bytes: piece(&mut input) },
            3 => ToAgent::InputEnd { offset: offset(&mut input, given) },
            4 => ToAgent::Ack { stream: stream(&mut input), offset: offset(&mut input, printed) },
            5 => ToAgent::Signal { sequence: u32::from(input.byte() % 4), number: input.byte() },
            6 => {
                let received = [offset(&mut input, printed), offset(&mut input, 0)];
                let _ = session.attach(received);
                continue;
            }
            7 => {
                session.detach(Instant(u64::from(input.byte()) << 24));
                let _ = session.reap(Instant(u64::from(input.byte()) << 26));
                continue;
            }
            8 => {
                printed += session.push(Stream::Out, &piece(&mut input)) as u64;
                continue;
            }
            9 => {
                let _ = session.next_message();
                continue;
            }
            10 => {
                let bytes = usize::from(input.byte()) << 6;
                session.input_written(bytes);
                written = given.min(written + bytes as u64);
                continue;
            }
            _ => {
                session.exited(ExitStatus::Code(input.byte()));
                continue;
            }
        };
        if let Ok(Some(Demand::Write(bytes))) = session.handle(message) {
            given += bytes.len() as u64;
        }
        assert!(given - written <= WINDOW_BYTES as u64 && session.room(Stream::Out) <= WINDOW_BYTES);
    }
    given
}

/// A hostile agent: what it makes the client hold is bounded, and the session ends once. Returns whether it ended.
pub fn client(data: &[u8]) -> bool {
    let mut input = Input(data);
    let mut session = ClientSession::new(SessionId([1; 16]), Task::Exec(Exec::default()));
    let (mut shown, mut held, mut ends) = ([0u64; 2], [0usize; 2], 0);
    while !input.0.is_empty() {
        let message = match input.byte() % 12 {
            0 => FromAgent::Opened {
                input_received: offset(&mut input, 0),
                signals_received: u32::from(input.byte() % 3),
            },
            1..=3 => {
                let stream = stream(&mut input);
                let offset = offset(&mut input, shown[stream.index()]);
                FromAgent::Output { stream, offset, bytes: piece(&mut input) }
            }
            4 => FromAgent::InputAck { offset: offset(&mut input, 0) },
            5 => FromAgent::SignalAck { sequence: u32::from(input.byte() % 3) },
            6 if input.byte().is_multiple_of(8) => {
                FromAgent::Exited { status: ExitStatus::Signal(input.byte()), ends: shown }
            }
            7 if input.byte().is_multiple_of(16) => {
                FromAgent::Failed { code: FailCode::System, detail: String::new() }
            }
            8 => {
                session.connected();
                continue;
            }
            9 => {
                let _ = session.next_message();
                session.push(&piece(&mut input));
                session.signal(input.byte());
                continue;
            }
            10 => {
                let stream = stream(&mut input);
                let bytes = held[stream.index()].min(usize::from(input.byte()) << 8);
                held[stream.index()] -= bytes;
                session.delivered(stream, bytes);
                continue;
            }
            _ => FromAgent::Pong,
        };
        match session.handle(message) {
            Ok(Some(News::Output(stream, bytes))) => {
                shown[stream.index()] += bytes.len() as u64;
                held[stream.index()] += bytes.len();
            }
            Ok(Some(News::Ended(_))) => ends += 1,
            Ok(Some(News::Opened) | None) | Err(_) => {}
        }
        assert!(held.iter().all(|&bytes| bytes <= WINDOW_BYTES) && ends <= 1);
    }
    ends == 1
}
