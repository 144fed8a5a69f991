//! A control plane without threads, sockets or clock: the test moves everything one step at a time.

#![allow(dead_code, reason = "each test uses its part")]

pub mod disk;

use std::collections::BTreeMap;

use controlplane::api::{LaunchRequest, Machine, MachineState, MigrateRequest, Migration, Problem};
use controlplane::core::{Answered, Config, Core, HostInput, IdempotencyKey, MachineRef, Now};
use controlplane::store::{RedbStore, StoreOptions};
use controlplane::testing::World;
use disk::Disk;
use tokio::sync::mpsc;
use wire::fleet::{FromHost, ToHost};
use wire::ids::{HostName, MachineId, MigrationId};

/// Milliseconds of one round.
const ROUND_MS: u64 = 20;
/// Rounds between heartbeats.
const HEARTBEAT_ROUNDS: u64 = 3;
/// More rounds than any scenario needs: 20 seconds.
const ROUNDS_MAX: u64 = 1000;

struct Link {
    connection: u64,
    commands: mpsc::Receiver<ToHost>,
}

/// A control plane, its disk, and hosts.
pub struct Rig {
    pub world: World,
    pub disk: Disk,
    pub crashes: u32,
    core: Option<Core>,
    born: bool,
    links: BTreeMap<HostName, Link>,
    hosts: Vec<HostName>,
    cut_off: Vec<HostName>,
    connections: u64,
    round: u64,
    seed: u64,
}

pub fn host(name: &str) -> HostName {
    name.parse().unwrap()
}

pub fn config() -> Config {
    Config {
        default_kernel: Some("/boot/guest".to_owned()),
        heartbeat_ms: 100,
        forward_ms: 100,
        doubt_ms: 200,
        retry_ms: 60,
        ..Config::default()
    }
}

impl Rig {
    /// Three hosts of 4 GiB, and a disk that fails at `crash_at`.
    pub fn new(crash_at: Option<u64>, seed: u64) -> Self {
        let hosts = vec![host("a"), host("b"), host("c")];
        let disk = Disk::default();
        if let Some(at) = crash_at {
            disk.crash_at(at);
        }
        let mut rig = Self {
            world: World::new(&hosts, 4 << 30),
            disk,
            crashes: 0,
            core: None,
            born: false,
            links: BTreeMap::new(),
            hosts,
            cut_off: Vec::new(),
            connections: 0,
            round: 0,
            seed,
        };
        rig.start();
        rig
    }

    fn now(&self) -> Now {
        let ms = self.round * ROUND_MS;
        Now { mono_ms: ms, unix_ms: 1_700_000_000_000 + ms }
    }

    /// Starts the control plane, again and again if the disk fails during the start.
    fn start(&mut self) {
        self.links.clear();
        loop {
            let store = RedbStore::on_backend(self.disk.clone(), StoreOptions::default());
            let unborn = !self.born;
            self.born |= store.is_ok();
            match store.and_then(|store| Core::open(Box::new(store), config(), self.now())) {
                Ok(core) => {
                    self.core = Some(core);
                    return;
                }
                Err(error) => {
                    assert!(self.disk.crashed(), "the store does not open: {error:?}");
                    self.crashes += 1;
                    if unborn && !self.born {
                        self.disk.replace();
                    } else {
                        self.disk.revive(self.seed);
                    }
                }
            }
        }
    }

    /// Kills the control plane, whatever it is doing, and starts it again.
    pub fn restart(&mut self) {
        self.core = None;
        if self.disk.crashed() {
            self.crashes += 1;
            self.disk.revive(self.seed);
        }
        self.start();
    }

    /// Runs `change` on the core, as often as it takes for one start of the control plane to keep it.
    pub fn call<R>(&mut self, mut change: impl FnMut(&mut Core) -> Result<R, Problem>) -> Result<R, Problem> {
        loop {
            let now = self.now();
            let core = self.core.as_mut().unwrap();
            let result = core.call(now, &mut change);
            if core.dead().is_none() {
                return result;
            }
            self.restart();
        }
    }

    fn input(&mut self, input: HostInput) {
        let now = self.now();
        let core = self.core.as_mut().unwrap();
        // What a dead control plane was told is lost, as it would be.
        let _ = core.call(now, |core| {
            core.host_input(input);
            Ok(())
        });
        if core.dead().is_some() {
            self.restart();
        }
    }

    /// Cuts a host off from the control plane, or lets it return.
    pub fn cut_off(&mut self, name: &HostName, cut: bool) {
        self.cut_off.retain(|other| other != name);
        if cut {
            self.cut_off.push(name.clone());
            if let Some(link) = self.links.remove(name) {
                self.input(HostInput::Left { host: name.clone(), connection: link.connection });
            }
        }
    }

    /// One round: hosts join if they are not, carry out commands, answer, and report; migrations move on by one step.
    pub fn round(&mut self) {
        self.round += 1;
        self.world.step();
        for name in self.hosts.clone() {
            if !self.cut_off.contains(&name) {
                self.turn(&name);
            }
        }
        let _ = self.call(|core| {
            core.tick();
            Ok(())
        });
    }

    fn turn(&mut self, name: &HostName) {
        if !self.links.contains_key(name) {
            self.connections += 1;
            let (sender, commands) = mpsc::channel(256);
            let connection = self.connections;
            self.links.insert(name.clone(), Link { connection, commands });
            self.input(HostInput::Joined {
                streams: None,
                host: name.clone(),
                connection,
                release: "test".to_owned(),
                boot_nonce: 1,
                sender,
            });
        }
        let mut says = self.world.take_notices(name);
        if let Some(link) = self.links.get_mut(name) {
            while let Ok(message) = link.commands.try_recv() {
                if let ToHost::Command { op, command } = message {
                    says.push(FromHost::Answer { op, answer: self.world.command(name, command) });
                }
            }
        }
        if self.round.is_multiple_of(HEARTBEAT_ROUNDS) {
            says.push(self.world.heartbeat(name));
        }
        for message in says {
            // A crash in between has cut the link.
            let Some(connection) = self.links.get(name).map(|link| link.connection) else { return };
            self.input(HostInput::Said { host: name.clone(), connection, message });
        }
    }

    /// Rounds until `is_so`.
    pub fn until(&mut self, what: &str, mut is_so: impl FnMut(&mut Self) -> bool) {
        for _ in 0..ROUNDS_MAX {
            if is_so(self) {
                return;
            }
            self.round();
        }
        panic!("never came to pass: {what}");
    }

    /// Some rounds.
    pub fn rounds(&mut self, count: u64) {
        for _ in 0..count {
            self.round();
        }
    }

    /// Runs `change` when all hosts are in sight; again if a crash came in between, since no host is in sight right after it.
    pub fn steady<R>(
        &mut self,
        mut change: impl FnMut(&mut Core) -> Result<R, Problem>,
    ) -> Result<R, Problem> {
        loop {
            self.until("all hosts are online", |rig| {
                let hosts = rig.call(|core| Ok(core.host_list())).unwrap().hosts;
                hosts.iter().filter(|host| host.ram_bytes.is_some()).count() == 3
            });
            let crashes = self.crashes;
            let result = self.call(&mut change);
            if result.is_ok() || self.crashes == crashes {
                return result;
            }
        }
    }

    /// As a client would: with a key, so that a repetition after a crash is the same request.
    fn keyed<T: serde::de::DeserializeOwned>(
        &mut self,
        key: &str,
        mut request: impl FnMut(&mut Core) -> Result<Answered, Problem>,
    ) -> Result<T, Problem> {
        let key = IdempotencyKey::new(key, "POST", key, b"").unwrap();
        let answered = self.steady(|core| core.once(Some(key.clone()), &mut request))?;
        Ok(serde_json::from_value(answered.body).unwrap())
    }

    pub fn launch(&mut self, name: &str, on: &str) -> Machine {
        let request = LaunchRequest {
            name: Some(host(name)),
            vcpus: 1,
            ram_bytes: 64 << 20,
            kernel: None,
            initrd: None,
            cmdline: None,
            host: Some(host(on)),
            ..LaunchRequest::default()
        };
        self.keyed(&format!("launch {name}"), |core| Answered::new(201, None, &core.launch(&request, None)?))
            .unwrap()
    }

    pub fn migrate(&mut self, key: &str, name: &str, to: &str) -> Result<Migration, Problem> {
        let request = MigrateRequest { target: Some(host(to)), ..MigrateRequest::default() };
        let machine = MachineRef::Name(host(name));
        self.keyed(key, |core| Answered::new(202, None, &core.migrate(&machine, &request)?))
    }

    pub fn machine(&mut self, name: &str) -> Machine {
        self.call(|core| core.machine(&MachineRef::Name(host(name)))).unwrap()
    }

    pub fn migration(&mut self, id: MigrationId) -> Migration {
        self.call(|core| core.migration(id)).unwrap()
    }

    pub fn until_state(&mut self, name: &str, state: MachineState) {
        self.until(state.as_str(), |rig| rig.machine(name).state == state);
    }

    pub fn until_ended(&mut self, id: MigrationId) -> Migration {
        self.until("the migration has ended", |rig| rig.migration(id).phase.is_terminal());
        self.migration(id)
    }

    /// The machine runs exactly once, where and as the records say, and nobody else has anything of it.
    pub fn check_settled(&mut self, name: &str, id: MachineId) {
        self.until("nothing is left over", |rig| rig.world.traces(id).len() <= 1);
        let machine = self.machine(name);
        assert_eq!(machine.state, MachineState::Started);
        let owner = (machine.host.clone().unwrap(), wire::ids::Epoch(machine.epoch));
        assert_eq!(self.world.running(id), [owner], "who runs it, and what is on record");
        assert_eq!(self.world.violations(), Vec::<String>::new());
        assert!(machine.migration.is_none());
    }
}
