//! One session: the protocol's state machine and the program it speaks for.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;

use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};
use wire::agent::{AgentSession, Demand, ExitStatus, FailCode, Reap, Stream, Task};
use wire::units::Instant;

use super::spawn::{self, Refused, Started};

/// How long output is awaited after the program's end, from what it left running, in microseconds: `tee` behind a shell still prints, a daemon
/// that keeps the pipe does not hold the session.
const LINGER_US: u64 = 2_000_000;
/// End of input, as typed on a terminal.
const END_OF_TRANSMISSION: u8 = 4;
/// Read at once.
const STEP_BYTES: usize = 64 << 10;

/// A session and its program.
#[derive(Debug)]
pub struct Session {
    /// The protocol's side.
    pub machine: AgentSession,
    /// The connection that has it.
    pub connection: Option<u64>,
    program: Started,
    exit_event: OwnedFd,
    group: Pid,
    waiting: VecDeque<u8>,
    input_ends: bool,
    quiet_since: Option<Instant>,
}

impl Session {
    /// Starts what the session is to do.
    ///
    /// # Errors
    /// [`Refused`], with a code for the client.
    pub fn start(task: &Task, now: Instant) -> Result<Self, Refused> {
        let mut program = spawn::start(task)?;
        let mut machine = AgentSession::new(now);
        for stream in Stream::ALL {
            if program.outputs[stream.index()].is_none() {
                machine.end_output(stream);
            }
        }
        let followed = follow(&program);
        let (group, exit_event) = followed.map_err(|error| {
            let _ = program.child.kill();
            let _ = program.child.wait();
            Refused { code: FailCode::System, detail: format!("cannot follow the program: {error}") }
        })?;
        Ok(Self {
            machine,
            connection: None,
            program,
            exit_event,
            group,
            waiting: VecDeque::new(),
            input_ends: false,
            quiet_since: None,
        })
    }

    /// What is to be awaited for it: the program's end, its outputs while there is room, its input while something waits.
    pub fn interests(&self) -> impl Iterator<Item = (Interest, BorrowedFd<'_>)> {
        let exit = (!self.machine.has_exited()).then(|| (Interest::Exit, self.exit_event.as_fd()));
        let outputs = Stream::ALL.into_iter().filter_map(|stream| {
            let end = self.program.outputs[stream.index()].as_ref()?;
            (self.machine.room(stream) > 0).then(|| (Interest::Output(stream), end.as_fd()))
        });
        let input = self.program.input.as_ref().filter(|_| !self.waiting.is_empty());
        exit.into_iter().chain(outputs).chain(input.map(|end| (Interest::Input, end.as_fd())))
    }

    /// Something that was awaited is there.
    pub fn ready(&mut self, interest: Interest, now: Instant) {
        match interest {
            Interest::Exit => self.reap_program(now),
            Interest::Output(stream) => self.read(stream, now),
            Interest::Input => self.write(),
        }
    }

    /// Does what the client asks of the program. `false` for what is not the program's business.
    pub fn apply(&mut self, demand: Demand) -> bool {
        match demand {
            Demand::Write(bytes) if self.program.input.is_some() => {
                self.waiting.extend(bytes);
                self.write();
            }
            // It has closed its input, or never had one.
            Demand::Write(bytes) => self.machine.input_written(bytes.len()),
            Demand::EndInput => {
                self.input_ends = true;
                if self.program.is_tty {
                    self.waiting.push_back(END_OF_TRANSMISSION);
                }
                self.write();
            }
            Demand::Signal(number) => self.signal(number),
            Demand::Resize(size) => {
                if let Some(terminal) = self.program.input.as_ref().filter(|_| self.program.is_tty) {
                    let _ = spawn::set_size(terminal, size);
                }
            }
            Demand::Pong | Demand::Close => return false,
        }
        true
    }

    fn reap_program(&mut self, now: Instant) {
        let status = match self.program.child.try_wait() {
            Ok(Some(status)) => status,
            Ok(None) => return,
            Err(_) => std::process::ExitStatus::from_raw(libc::SIGKILL),
        };
        let small = |number: i32| u8::try_from(number).unwrap_or(u8::MAX);
        self.machine.exited(match status.signal() {
            Some(signal) => ExitStatus::Signal(small(signal)),
            None => ExitStatus::Code(small(status.code().unwrap_or_default())),
        });
        self.quiet_since = Some(now);
        self.discard_input();
    }

    fn read(&mut self, stream: Stream, now: Instant) {
        let Some(end) = &self.program.outputs[stream.index()] else { return };
        let room = self.machine.room(stream).min(STEP_BYTES);
        let mut buffer = [0; STEP_BYTES];
        match rustix::io::read(end, &mut buffer[..room]) {
            Ok(count) if count > 0 => {
                self.machine.push(stream, &buffer[..count]);
                self.quiet_since = self.quiet_since.map(|_| now);
            }
            Err(Errno::AGAIN | Errno::INTR) => {}
            // End of file; from a terminal nobody has open any more it comes as EIO.
            Ok(_) | Err(_) => self.end_output(stream),
        }
    }

    fn end_output(&mut self, stream: Stream) {
        self.program.outputs[stream.index()] = None;
        self.machine.end_output(stream);
    }

    fn write(&mut self) {
        let Some(end) = &self.program.input else { return };
        while !self.waiting.is_empty() {
            match rustix::io::write(end, self.waiting.as_slices().0) {
                Ok(count) => {
                    self.waiting.drain(..count);
                    self.machine.input_written(count);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                Err(_) => return self.discard_input(),
            }
        }
        if self.input_ends && !self.program.is_tty {
            self.program.input = None;
        }
    }

    /// Nobody reads it any more: the client may forget it.
    fn discard_input(&mut self) {
        self.machine.input_written(self.waiting.len());
        self.waiting.clear();
        self.program.input = None;
    }

    fn signal(&self, number: u8) {
        let Some(signal) = Signal::from_named_raw(number.into()) else { return };
        // On a terminal those in its foreground are meant, as when it is typed there.
        let terminal = self.program.input.as_ref().filter(|_| self.program.is_tty);
        let foreground = terminal.and_then(|terminal| rustix::termios::tcgetpgrp(terminal).ok());
        self.signal_group(foreground.unwrap_or(self.group), signal);
    }

    fn signal_group(&self, group: Pid, signal: Signal) {
        // After its end the number may be another's.
        if !self.machine.has_exited() {
            let _ = kill_process_group(group, signal);
        }
    }

    /// When [`Session::expire`] wants to be called.
    pub fn deadline(&self) -> Option<Instant> {
        let linger = self.quiet_since.filter(|_| self.program.outputs.iter().any(Option::is_some));
        linger.map(|since| since.plus_us(LINGER_US)).into_iter().chain(self.machine.deadline()).min()
    }

    /// Ends what has had its time. `true`: forget the session.
    pub fn expire(&mut self, now: Instant) -> bool {
        if self.quiet_since.is_some_and(|since| now.us_since(since) >= LINGER_US) {
            for stream in Stream::ALL {
                // While the client does not take what there is, nothing can be said about silence.
                if self.program.outputs[stream.index()].is_some() && self.machine.room(stream) > 0 {
                    self.end_output(stream);
                }
            }
            self.quiet_since = Some(now);
        }
        match self.machine.reap(now) {
            None => false,
            Some(Reap::Hangup) => {
                self.signal_group(self.group, Signal::HUP);
                false
            }
            Some(Reap::Kill) => true,
        }
    }

    /// Hangs up what runs, and hands out the program if it has yet to end.
    pub fn close(self) -> Option<Leftover> {
        self.signal_group(self.group, Signal::HUP);
        self.signal_group(self.group, Signal::CONT);
        let running = !self.machine.has_exited();
        running.then_some(Leftover { program: self.program, exit_event: self.exit_event, group: self.group })
    }
}

/// What a session waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interest {
    /// The program's end.
    Exit,
    /// Output.
    Output(Stream),
    /// Room for input.
    Input,
}

/// A program without a session: hung up, and killed if that is not enough.
#[derive(Debug)]
pub struct Leftover {
    program: Started,
    exit_event: OwnedFd,
    group: Pid,
}

impl Leftover {
    /// For `poll`: readable when the program has ended.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.exit_event.as_fd()
    }

    /// Whether it has ended; then it is no zombie any more.
    pub fn has_ended(&mut self) -> bool {
        !matches!(self.program.child.try_wait(), Ok(None))
    }

    /// Ends it now.
    pub fn kill(&self) {
        let _ = kill_process_group(self.group, Signal::KILL);
    }
}

fn follow(program: &Started) -> io::Result<(Pid, OwnedFd)> {
    let id = i32::try_from(program.child.id()).ok().and_then(Pid::from_raw);
    let id = id.ok_or_else(|| io::Error::other("a process without a number"))?;
    Ok((id, pidfd_open(id, PidfdFlags::empty())?))
}
