//! A minute of trouble that nobody planned: the machine moves to and fro, and each time something else breaks, at some moment.
//!
//! The moment and the trouble are drawn from a seed, which is printed; `MASHINES_CHAOS_SEED=N` draws the same ones again (what
//! happens in between is the machine's, so a failure may need some tries). `MASHINES_CHAOS_SECONDS` makes it longer.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use controlplane::api::{Migration, Phase};
use tests::{Move, Scene, survives, tidy};
use xtask::fleet::layout::Host;

/// How long, unless the environment says otherwise.
const SECONDS: u64 = 60;
/// Trouble comes within this time after the migration was asked for, which is about how long one takes.
const MOMENT_MS_MAX: u64 = 700;
/// How long something that stops stays stopped: from unnoticed to longer than a silent peer is taken for alive.
const STOPPED_MS_MAX: u64 = 4000;

#[derive(Debug, Clone, Copy)]
enum Trouble {
    Nothing,
    KillDaemon(Side),
    FreezeMachine(Side),
    KillControlPlane,
    CutLink,
    Cancel,
}

#[derive(Debug, Clone, Copy)]
enum Side {
    Source,
    Target,
}

const TROUBLES: [Trouble; 8] = [
    Trouble::Nothing,
    Trouble::KillDaemon(Side::Source),
    Trouble::KillDaemon(Side::Target),
    Trouble::FreezeMachine(Side::Source),
    Trouble::FreezeMachine(Side::Target),
    Trouble::KillControlPlane,
    Trouble::CutLink,
    Trouble::Cancel,
];

/// Whatever happens before, in and after a switch-over, there is one machine, whole, on one host, and it can move on. (Hosts that lose
/// power take their machines with them, and have tests of their own.)
#[test]
fn trouble_at_any_moment_leaves_one_whole_machine() -> Result<()> {
    let seed = from_environment("MASHINES_CHAOS_SEED")?.unwrap_or_else(seed_of_now);
    let limit = Duration::from_secs(from_environment("MASHINES_CHAOS_SECONDS")?.unwrap_or(SECONDS));
    println!("MASHINES_CHAOS_SEED={seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    survives("chaos", "128M", |scene| {
        let begun = Instant::now();
        let mut at = scene.a;
        let mut count = 0;
        while begun.elapsed() < limit {
            let trouble = TROUBLES[random.usize(..TROUBLES.len())];
            let moment = Duration::from_millis(random.u64(..MOMENT_MS_MAX));
            let stopped = Duration::from_millis(random.u64(..STOPPED_MS_MAX));
            let told = format!("move {count}: {trouble:?} after {moment:?}, for {stopped:?}");
            let (host, phase) = one_move(scene, at, trouble, moment, stopped).context(told.clone())?;
            println!("{told}: {} on {}", phase.as_str(), host.name());
            at = host;
            count += 1;
        }
        Ok(at)
    })
}

/// One migration away from `at`, and the trouble; returns where the machine is, and well, thereafter.
fn one_move(
    scene: &mut Scene,
    at: Host,
    trouble: Trouble,
    moment: Duration,
    stopped: Duration,
) -> Result<(Host, Phase)> {
    let to = scene.ground.other(at);
    let moving = scene.subject.move_to(&scene.ground, to)?;
    std::thread::sleep(moment);
    make(scene, trouble, &moving, at, stopped)?;
    let end = moving.ends(&scene.ground)?;
    scene.ground.fleet.await_hosts()?;
    let host = tidy::host_of(&scene.ground, &scene.subject.name)?;
    if (end.phase == Phase::Succeeded) != (host == to) {
        anyhow::bail!("the migration ended as {}, and the machine is on {}", end.phase.as_str(), host.name());
    }
    scene.subject.is_well_on(&scene.ground, host)?;
    Ok((host, end.phase))
}

fn make(scene: &mut Scene, trouble: Trouble, moving: &Move, at: Host, stopped: Duration) -> Result<()> {
    let ground = &mut scene.ground;
    let other = ground.other(at);
    let host = |side| match side {
        Side::Source => at,
        Side::Target => other,
    };
    match trouble {
        Trouble::Nothing => Ok(()),
        Trouble::KillDaemon(side) => {
            let host = host(side);
            ground.fleet.kill(&host.name())?;
            ground.restart(host)
        }
        Trouble::FreezeMachine(side) => {
            let frozen = ground.freeze(host(side));
            std::thread::sleep(stopped);
            drop(frozen);
            Ok(())
        }
        Trouble::KillControlPlane => {
            ground.fleet.kill("control")?;
            ground.fleet.start_control()?;
            ground.fleet.await_hosts()
        }
        Trouble::CutLink => {
            ground.fleet.cut(&other)?;
            std::thread::sleep(stopped);
            ground.fleet.mend(&other)
        }
        Trouble::Cancel => {
            // It may have ended meanwhile, which is no fault.
            let _: Option<Migration> = ground.ask(&["migrations", "cancel", &moving.id()]).ok();
            Ok(())
        }
    }
}

fn from_environment(name: &str) -> Result<Option<u64>> {
    let Ok(text) = std::env::var(name) else { return Ok(None) };
    text.parse().map(Some).with_context(|| format!("{name} is no number: {text}"))
}

fn seed_of_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| u64::from(now.subsec_nanos()))
}
