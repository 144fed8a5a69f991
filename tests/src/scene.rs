//! Where each test begins and how it ends, so that a test itself only tells what breaks.

use anyhow::{Context, Result};
use controlplane::api::Stage;
use xtask::fleet::layout::Host;

use crate::ground::{Frozen, Ground};
use crate::moves::Move;
use crate::subject::Subject;
use crate::{LOADING, tidy};

/// A fleet of two hosts, and a machine at work on the first of them.
#[derive(Debug)]
pub struct Scene {
    /// Host `host-a`, where the machine is.
    pub a: Host,
    /// Host `host-b`, where it is moved to.
    pub b: Host,
    /// The fleet.
    pub ground: Ground,
    /// The machine.
    pub subject: Subject,
}

/// Sets the scene with a machine of `memory`, has `story` break something, and asks what is always asked: is the machine well on the host
/// that the story ends with, and nowhere else; can it move on; is anything left.
///
/// # Errors
/// When an answer is not what it must be.
pub fn survives(name: &str, memory: &str, story: impl FnOnce(&mut Scene) -> Result<Host>) -> Result<()> {
    let Some(mut scene) = Scene::set(name, memory)? else { return Ok(()) };
    let host = story(&mut scene)?;
    let Scene { ground, mut subject, .. } = scene;
    subject.is_well_on(&ground, host)?;
    subject.can_still_move(&ground, ground.other(host))?;
    subject.finish()?;
    ground.finish()
}

/// As [`survives`], for a `story` that costs the machine its memory: it has failed, no host holds anything of it, and it can be started
/// again and is like any other thereafter.
///
/// # Errors
/// When an answer is not what it must be.
pub fn is_lost(name: &str, memory: &str, story: impl FnOnce(&mut Scene) -> Result<()>) -> Result<()> {
    let Some(mut scene) = Scene::set(name, memory)? else { return Ok(()) };
    story(&mut scene)?;
    let Scene { ground, subject, .. } = scene;
    let mut subject = subject.start_again(&ground).context("starting a lost machine again")?;
    let host = tidy::host_of(&ground, &subject.name)?;
    subject.is_well_on(&ground, host)?;
    subject.can_still_move(&ground, ground.other(host))?;
    subject.finish()?;
    ground.finish()
}

impl Scene {
    fn set(name: &str, memory: &str) -> Result<Option<Self>> {
        let Some(ground) = Ground::up(name) else { return Ok(None) };
        let subject = Subject::launch(&ground, ground.a, memory)?;
        Ok(Some(Self { a: ground.a, b: ground.b, ground, subject }))
    }

    /// Moves the machine to host-b, until the migration is in `stage`.
    ///
    /// # Errors
    /// When it does not get there.
    pub fn moves_until(&self, stage: Stage) -> Result<Move> {
        let moving = self.subject.move_to(&self.ground, self.b)?;
        moving.reaches(&self.ground, stage)?;
        Ok(moving)
    }

    /// Moves it until it is paused. The copy on the target is stopped and cannot load the machine's state, so there it stays until the
    /// returned processes go on.
    ///
    /// # Errors
    /// When it does not get there.
    pub fn moves_until_paused(&self) -> Result<(Move, Frozen)> {
        let moving = self.moves_until(Stage::Precopy)?;
        let target = self.ground.freeze(self.b);
        moving.reaches(&self.ground, Stage::Switchover)?;
        Ok((moving, target))
    }

    /// Moves it until the target has all of it and waits for Commit. The copy on the source is stopped while its daemon waits for it to
    /// let go of the machine.
    ///
    /// # Errors
    /// When it does not get there.
    pub fn moves_until_given_away(&self) -> Result<(Move, Frozen)> {
        let (moving, target) = self.moves_until_paused()?;
        let source = self.ground.freeze(self.a);
        drop(target);
        std::thread::sleep(LOADING);
        Ok((moving, source))
    }

    /// Moves it until Commit has left the source. The copy on the target is stopped while its daemon waits for it to run.
    ///
    /// # Errors
    /// When it does not get there.
    pub fn moves_until_committed(&self) -> Result<(Move, Frozen)> {
        let (moving, source) = self.moves_until_given_away()?;
        let target = self.ground.freeze(self.b);
        drop(source);
        moving.reaches(&self.ground, Stage::Committing)?;
        Ok((moving, target))
    }
}
