//! The network between the hosts breaks.

use std::time::Duration;

use anyhow::Result;
use controlplane::api::{Phase, Stage};
use tests::{Ground, Subject};

/// Longer than a silent peer is taken for alive.
const CUT: Duration = Duration::from_secs(5);

#[test]
fn a_cut_while_memory_is_copied_costs_nothing_but_time() -> Result<()> {
    let Some(ground) = Ground::up("cut") else { return Ok(()) };
    let (a, b) = (ground.a, ground.b);
    let mut subject = Subject::launch(&ground, a, "256M")?;
    let moving = subject.move_to(&ground, b)?;
    moving.reaches(&ground, Stage::Precopy)?;
    ground.fleet.cut(&b)?;
    moving.reaches(&ground, Stage::Reconnecting)?;
    std::thread::sleep(CUT);
    ground.fleet.mend(&b)?;
    moving.ends_as(&ground, Phase::Succeeded)?;
    subject.is_well_on(&ground, b)?;
    subject.can_still_move(&ground, a)?;
    subject.finish()?;
    ground.finish()
}
