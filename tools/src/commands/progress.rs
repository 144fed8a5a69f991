//! A migration's progress: a bar on a terminal, plain lines (few) elsewhere, on standard error.

use std::io::IsTerminal as _;
use std::time::Duration;

use controlplane::api::{self, Migration, Phase, Stage};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::exit::Failure;
use crate::units::{show_bytes, show_ms, show_us};

/// Between attempts to reach a control plane that is restarting.
const RETRY: Duration = Duration::from_millis(500);
/// Attempts in a row: half a minute, longer than a restart takes.
const RETRIES_MAX: u32 = 60;

/// Shows a migration as it goes.
pub(super) struct Progress {
    bar: Option<ProgressBar>,
    lines: bool,
    last: String,
    retries: u32,
}

impl Progress {
    pub(super) fn new(show: bool) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let bar = (show && terminal).then(bar);
        Self { bar, lines: show && !terminal, last: String::new(), retries: 0 }
    }

    pub(super) fn show(&mut self, migration: &Migration) {
        self.retries = 0;
        let stage = migration.progress.as_ref().map(|progress| progress.stage);
        if let Some(bar) = &self.bar {
            if let Some(progress) = &migration.progress {
                bar.set_length(progress.ram_bytes);
                bar.set_position(progress.ram_bytes.saturating_sub(progress.remaining_bytes));
                bar.set_message(describe(progress));
            } else {
                let message = migration.message.clone().unwrap_or_default();
                bar.set_message(format!("{} {message}", migration.phase.as_str()));
            }
            return;
        }
        let line = line(migration, stage);
        if self.lines && line != self.last {
            eprintln!("{line}");
            self.last = line;
        }
    }

    /// Says something that is not progress.
    pub(super) fn note(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.set_message(text.to_owned()),
            None if self.lines && self.retries == 0 => eprintln!("{text}"),
            None => {}
        }
    }

    pub(super) async fn pause_before_retry(&mut self) -> Result<(), Failure> {
        self.retries += 1;
        if self.retries > RETRIES_MAX {
            return Err(Failure::Failed {
                detail: "the control plane did not come back; the hosts go on by themselves".to_owned(),
                remedy: "start mashines-control and look at `mashines migrations`".to_owned(),
            });
        }
        tokio::time::sleep(RETRY).await;
        Ok(())
    }

    pub(super) fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn bar() -> ProgressBar {
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(10));
    let colour = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let template = if colour { "{bar:30.cyan} {percent:>3}% {msg}" } else { "{bar:30} {percent:>3}% {msg}" };
    // The template is a constant; if it were wrong the default style would do.
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar
}

/// One line of progress.
pub(super) fn describe(progress: &api::Progress) -> String {
    let mut text = format!(
        "{}, round {}: {} sent, {} left, {}/s, {} pages/s dirtied",
        progress.stage.as_str(),
        progress.round,
        show_bytes(progress.sent_bytes),
        show_bytes(progress.remaining_bytes),
        show_bytes(progress.bytes_per_s),
        progress.dirty_pages_per_s
    );
    if progress.predicted_downtime_us > 0 {
        text.push_str(&format!(", pause about {}", show_us(progress.predicted_downtime_us)));
    }
    if progress.eta_ms > 0 {
        text.push_str(&format!(", {} to go", show_ms(progress.eta_ms)));
    }
    text
}

/// What changes only with the phase, the stage and the round: one line for each in a log.
fn line(migration: &Migration, stage: Option<Stage>) -> String {
    let name = &migration.machine_name;
    let route = format!("{name}: {} -> {}", migration.source, migration.target);
    match (migration.phase, stage, &migration.progress) {
        (Phase::Running, Some(stage), Some(progress)) => {
            format!("{route}: {}, round {}", stage.as_str(), progress.round)
        }
        (phase, ..) => match &migration.message {
            Some(message) => format!("{route}: {} ({message})", phase.as_str()),
            None => format!("{route}: {}", phase.as_str()),
        },
    }
}
