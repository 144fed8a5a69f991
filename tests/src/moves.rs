//! A migration under way.

use std::time::Duration;

use anyhow::{Result, bail};
use controlplane::api::{Migration, Phase, Stage};
use wire::ids::MigrationId;
use xtask::fleet::layout::Host;

use crate::ground::{Ground, until};

/// How long a migration may take to get somewhere or to end. The longest waits within are 3 s for a silent peer and 5 s for a silent VMM.
const MOVE_LIMIT: Duration = Duration::from_secs(60);

/// A migration that was asked for.
#[derive(Debug, Clone)]
pub struct Move {
    id: MigrationId,
}

impl Move {
    /// Asks for it and returns at once.
    ///
    /// # Errors
    /// When it is refused.
    pub fn begin(ground: &Ground, machine: &str, to: Host) -> Result<Self> {
        let asked: Migration = ground.ask(&["migrate", machine, "--to", &to.name(), "--detach"])?;
        Ok(Self { id: asked.id })
    }

    /// Its id, as text.
    pub fn id(&self) -> String {
        self.id.to_string()
    }

    /// The control plane's view of it.
    ///
    /// # Errors
    /// When the control plane does not answer.
    pub fn view(&self, ground: &Ground) -> Result<Migration> {
        ground.ask(&["migrations", "get", &self.id()])
    }

    /// Waits until it is in `stage`.
    ///
    /// # Errors
    /// When it ends before, or does not get there.
    pub fn reaches(&self, ground: &Ground, stage: Stage) -> Result<()> {
        until(&format!("the stage {}", stage.as_str()), MOVE_LIMIT, || {
            let view = self.view(ground)?;
            let now = view.progress.map(|progress| progress.stage);
            if now == Some(stage) {
                return Ok(Ok(()));
            }
            if view.phase.is_terminal() {
                bail!(
                    "it ended as {} before it was in {}: {:?}",
                    view.phase.as_str(),
                    stage.as_str(),
                    view.error
                );
            }
            Ok(Err(format!("it is in {} {now:?}", view.phase.as_str())))
        })
    }

    /// Waits until it has ended. The control plane may be away meanwhile.
    ///
    /// # Errors
    /// When it does not end.
    pub fn ends(&self, ground: &Ground) -> Result<Migration> {
        self.ends_within(ground, MOVE_LIMIT)
    }

    /// As [`Move::ends`], with another limit.
    ///
    /// # Errors
    /// When it does not end within `limit`.
    pub fn ends_within(&self, ground: &Ground, limit: Duration) -> Result<Migration> {
        until("the migration to end", limit, || {
            Ok(match self.view(ground) {
                Ok(view) if view.phase.is_terminal() => Ok(view),
                Ok(view) => {
                    Err(format!("it is {} ({:?}, {:?})", view.phase.as_str(), view.message, view.progress))
                }
                Err(error) => Err(format!("{error:#}")),
            })
        })
    }

    /// Waits until it has ended, which must be as `phase`.
    ///
    /// # Errors
    /// When it does not, or ends otherwise.
    pub fn ends_as(&self, ground: &Ground, phase: Phase) -> Result<Migration> {
        let end = self.ends(ground)?;
        if end.phase != phase {
            bail!("it ended as {} instead of {}: {:?}", end.phase.as_str(), phase.as_str(), end.error);
        }
        Ok(end)
    }
}
