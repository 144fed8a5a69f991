//! Booting a lab host: its console is watched until the host says that it is ready, and a boot that hangs is begun again.
//!
//! ```text
//!   start --> booting --"READY"--> up
//!     ^          | silent too long, or too long in all
//!     +----------+ (at most TRIES times; a QEMU that ends by itself is an error at once)
//! ```

use std::path::Path;
use std::process::Child;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail};

use crate::fleet::layout::FleetName;
use crate::fleet::processes::{self, Lines, Service};
use crate::signals;

/// What the second program of a host prints at its end.
pub(super) const READY: &str = "lab host: READY";
/// What either program prints before it gives up.
const FAILED: &str = "lab host: FAILED";
/// How often a boot is tried.
const TRIES: u32 = 3;
/// Longest silence of a console that is taken for slowness. A boot was never seen silent for a quarter of it.
const SILENCE_LIMIT: Duration = Duration::from_secs(40);
/// Longest boot. It takes 10 s on two idle cores.
const BOOT_LIMIT: Duration = Duration::from_secs(240);
/// Longest wait for a line before the other reasons to give up are looked at.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// A host whose QEMU runs.
#[derive(Debug)]
pub(super) struct Booting {
    service: Service,
    child: Child,
    begun: Instant,
}

/// How a boot stands.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Ready,
    Going,
    Failed(String),
    Hung(&'static str),
}

impl Booting {
    /// Starts a host.
    pub(super) fn start(lab: &FleetName, service: Service) -> Result<Self> {
        let child = service.start(lab)?;
        Ok(Self { service, child, begun: Instant::now() })
    }

    /// Waits until it is up; returns its QEMU, and how long the boot took that came through.
    ///
    /// # Errors
    /// When QEMU ends, a set-up step fails in the host, or each of the boots hangs; with the end of the console.
    pub(super) fn await_up(mut self, lab: &FleetName) -> Result<(Child, Duration)> {
        for attempt in 1.. {
            let Err(why) = self.watch()? else { break };
            self.stop()?;
            let name = &self.service.name;
            if attempt == TRIES {
                bail!("{name} did not boot in {TRIES} tries: {why}\n{}", processes::tail(&self.service.log));
            }
            eprintln!("lab: the boot of {name} hangs ({why}); starting it again");
            let kept = self.service.log.with_extension(format!("hung{attempt}.log"));
            std::fs::rename(&self.service.log, &kept)
                .with_context(|| format!("renaming {}", self.service.log.display()))?;
            self.child = self.service.start(lab)?;
            self.begun = Instant::now();
        }
        Ok((self.child, self.begun.elapsed()))
    }

    /// Watches one boot. The inner error says why it is taken for hung.
    fn watch(&mut self) -> Result<Result<(), &'static str>> {
        let name = &self.service.name;
        let lines = Lines::of(&self.service.log)?;
        loop {
            signals::check()?;
            match verdict(&lines.text()?, self.begun.elapsed(), silence(&self.service.log)) {
                Verdict::Ready => return Ok(Ok(())),
                Verdict::Hung(why) => return Ok(Err(why)),
                Verdict::Failed(line) => bail!("{name}: {line}\n{}", processes::tail(&self.service.log)),
                Verdict::Going => {}
            }
            if let Some(status) = self.child.try_wait().with_context(|| format!("asking for {name}"))? {
                bail!("{name}: QEMU ended ({status})\n{}", processes::tail(&self.service.log));
            }
            lines.wait(LOOK_EVERY);
        }
    }

    fn stop(&mut self) -> Result<()> {
        let name = &self.service.name;
        self.child.kill().with_context(|| format!("killing {name}"))?;
        self.child.wait().with_context(|| format!("waiting for {name}")).map(drop)
    }
}

/// How long nothing has been written to a log.
fn silence(log: &Path) -> Duration {
    let written = std::fs::metadata(log).and_then(|data| data.modified()).ok();
    written.and_then(|time| SystemTime::now().duration_since(time).ok()).unwrap_or_default()
}

fn verdict(console: &str, age: Duration, silent: Duration) -> Verdict {
    if let Some(line) = console.lines().find(|line| line.contains(FAILED)) {
        return Verdict::Failed(line.trim().to_owned());
    }
    if console.lines().any(|line| line.contains(READY)) {
        return Verdict::Ready;
    }
    // A log that was there before tells nothing: its silence began before the boot.
    if silent.min(age) > SILENCE_LIMIT {
        return Verdict::Hung("its console is silent");
    }
    if age > BOOT_LIMIT { Verdict::Hung("it takes too long") } else { Verdict::Going }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(41);
    const SHORT: Duration = Duration::from_secs(5);

    #[test]
    fn a_boot_is_hung_when_silent_or_endless() {
        assert_eq!(verdict("[    0.1] x\n", LONG, SHORT), Verdict::Going);
        assert_eq!(
            verdict("[    0.1] x\n", SHORT, LONG),
            Verdict::Going,
            "the silence is older than the boot"
        );
        assert!(matches!(verdict("[    0.1] x\n", LONG, LONG), Verdict::Hung(_)));
        assert!(matches!(verdict("", BOOT_LIMIT + SHORT, SHORT), Verdict::Hung(_)));
    }

    #[test]
    fn a_boot_ends_by_its_own_word() {
        let ready = format!("[    9.1] tun: x{READY}\r\n");
        assert_eq!(verdict(&ready, BOOT_LIMIT + LONG, LONG), Verdict::Ready);
        let failed = format!("a\n{FAILED}: the disk\n{READY}\n");
        assert_eq!(verdict(&failed, SHORT, SHORT), Verdict::Failed(format!("{FAILED}: the disk")));
    }
}
