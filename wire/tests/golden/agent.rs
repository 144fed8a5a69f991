//! Messages between client and agent. An agent is as old as the image it is in, and a machine may never stop: what is
//! written here is spoken for years.

use wire::agent::{
    Exec, ExitStatus, FailCode, FromAgent, Info, Request, SessionId, Size, Stream, Task, ToAgent, VERSION,
    Variable,
};

use crate::golden::{check, line};

const SESSION: SessionId = SessionId([0xa5; 16]);

fn to_agent(name: &str, message: ToAgent) -> String {
    line(VERSION, &format!("to_agent.{name}"), message)
}

fn from_agent(name: &str, message: FromAgent) -> String {
    line(VERSION, &format!("from_agent.{name}"), message)
}

fn request_lines() -> String {
    [
        ("info", Request::Info),
        ("set_time", Request::SetTime { realtime_ns: 0x0102_0304_0506_0708 }),
        ("shutdown", Request::Shutdown { reboot: false }),
        ("reboot", Request::Shutdown { reboot: true }),
        ("ping", Request::Ping),
    ]
    .map(|(name, request)| to_agent(name, ToAgent::Request(request)))
    .concat()
}

fn task_lines() -> String {
    let exec = Exec {
        argv: vec![b"sh".to_vec(), b"-c".to_vec()],
        env: vec![Variable { name: b"TERM".to_vec(), value: b"xterm".to_vec() }],
        cwd: Some(b"/srv".to_vec()),
        user: Some("app".into()),
        tty: Some(Size { columns: 80, rows: 24 }),
        stdin: true,
    };
    [
        ("exec", Task::Exec(exec)),
        ("shell", Task::Exec(Exec::default())),
        ("export", Task::Export { path: b"/etc".to_vec(), user: None }),
        ("import", Task::Import { path: b"/tmp/x".to_vec(), user: Some("1000".into()) }),
    ]
    .map(|(name, task)| to_agent(name, ToAgent::Open { session: SESSION, task }))
    .concat()
}

fn session_lines() -> String {
    [
        to_agent("resume", ToAgent::Resume { session: SESSION, received: [3, 4] }),
        to_agent("input", ToAgent::Input { offset: 5, bytes: b"ls\n".to_vec() }),
        to_agent("input_end", ToAgent::InputEnd { offset: 8 }),
        to_agent("signal", ToAgent::Signal { sequence: 1, number: 15 }),
        to_agent("resize", ToAgent::Resize(Size { columns: 132, rows: 43 })),
        to_agent("ack", ToAgent::Ack { stream: Stream::Err, offset: 9 }),
        to_agent("close", ToAgent::Close),
        from_agent("opened", FromAgent::Opened { input_received: 6, signals_received: 2 }),
        from_agent(
            "output",
            FromAgent::Output { stream: Stream::Out, offset: 7, bytes: b"a.txt\n".to_vec() },
        ),
        from_agent("input_ack", FromAgent::InputAck { offset: 8 }),
        from_agent("signal_ack", FromAgent::SignalAck { sequence: 1 }),
        from_agent("exited", FromAgent::Exited { status: ExitStatus::Code(3), ends: [13, 0] }),
        from_agent("killed", FromAgent::Exited { status: ExitStatus::Signal(9), ends: [0, 1] }),
    ]
    .concat()
}

fn answer_lines() -> String {
    let info = Info {
        boot_id: "4e1c".into(),
        uptime_ms: 1,
        load_milli: [2, 3, 4],
        memory_bytes: 5,
        memory_available_bytes: 6,
        hostname: "web".into(),
        kernel: "6.1.0".into(),
        agent: "0.1.0".into(),
        addresses: vec!["2001:db8::1".into()],
        realtime_ns: 7,
        sessions: 8,
    };
    let failures = [
        FailCode::NotFound,
        FailCode::NotExecutable,
        FailCode::NoSuchUser,
        FailCode::NoSuchSession,
        FailCode::TooManySessions,
        FailCode::TooManyConnections,
        FailCode::BadRequest,
        FailCode::Version,
        FailCode::Superseded,
        FailCode::System,
    ];
    let failed =
        |code| from_agent(&format!("failed.{code:?}"), FromAgent::Failed { code, detail: "why".into() });
    [
        from_agent("info", FromAgent::Info(Box::new(info))),
        from_agent("done", FromAgent::Done),
        from_agent("pong", FromAgent::Pong),
        failures.map(failed).concat(),
    ]
    .concat()
}

#[test]
fn every_message_of_an_agent_is_written_as_ever() {
    check("agent.txt", &[request_lines(), task_lines(), session_lines(), answer_lines()].concat());
}
