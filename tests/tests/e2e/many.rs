//! Many machines at once.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use controlplane::api::{Machine, Phase};
use tests::{Ground, Move, tidy};
use xtask::demo::guest::{Commands, Done, Status, Verified};

const MACHINES: usize = 20;
/// 20 machines' worth of work on whatever cores there are.
const EACH: Duration = Duration::from_secs(60);

/// Half of them go each way, all asked for at once: hosts take as many at a time as they can.
#[test]
fn twenty_machines_change_hosts_at_once() -> Result<()> {
    let Some(ground) = Ground::up("many") else { return Ok(()) };
    let client = ground.fleet.name().fabric_namespace();
    let mut guests = BTreeMap::new();
    for number in 0..MACHINES {
        let host = if number % 2 == 0 { ground.a } else { ground.b };
        let name = format!("m{number}");
        let machine: Machine = ground.ask(&[
            "launch",
            "--name",
            &name,
            "--host",
            &host.name(),
            "--memory",
            "32M",
            "--cmdline",
            "mashine.mode=rest mashine.dirty=20",
        ])?;
        let mut commands = Commands::connect(&client, IpAddr::V4(machine.ip4))?;
        let status: Status = commands.ask("status")?;
        guests.insert(name, (ground.other(host), commands, status));
    }
    let moves: Result<Vec<Move>> =
        guests.iter().map(|(name, (target, ..))| Move::begin(&ground, name, *target)).collect();
    for moving in moves? {
        moving
            .ends_within(&ground, EACH)?
            .phase
            .eq(&Phase::Succeeded)
            .then_some(())
            .context("one did not move")?;
    }
    for (name, (target, commands, before)) in &mut guests {
        let now: Status = commands.ask("status")?;
        ensure!(
            now.boot_id == before.boot_id && now.uptime_us > before.uptime_us,
            "{name} is another now: {now:?}"
        );
        let seen: Verified = commands.ask("verify")?;
        ensure!(seen.wrong == 0 && seen.sum_ok, "the memory of {name} is damaged: {seen:?}");
        let host = ground.machine(name)?.host.map(|host| host.to_string());
        ensure!(host == Some(target.name()), "{name} is on {host:?}");
    }
    tidy::each_holds(&ground, MACHINES / 2)?;
    for (_, commands, _) in guests.values_mut() {
        let _: Done = commands.ask("shutdown")?;
    }
    ground.finish()
}
