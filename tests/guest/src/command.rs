//! The commands of the TCP port, as types.
//!
//! Parsing is total: a line is a [`Command`] or a short error text that is sent back. Words a command does not know
//! are errors, so that a typing error does not silently test something else.

/// Order in which pages are dirtied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pattern {
    /// One after the other, round and round.
    Seq,
    /// At random.
    Rand,
}

impl Pattern {
    /// `seq` or `rand`.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        match text {
            "seq" => Some(Self::Seq),
            "rand" => Some(Self::Rand),
            _ => None,
        }
    }

    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Seq => "seq",
            Self::Rand => "rand",
        }
    }
}

/// What the loops do when there is nothing to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Turn on.
    Spin,
    /// Halt for at most a millisecond.
    Idle,
    /// Halt for at most 20 ms.
    Rest,
}

impl Mode {
    /// `spin`, `idle` or `rest`.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        [Self::Spin, Self::Idle, Self::Rest].into_iter().find(|mode| mode.name() == text)
    }

    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Spin => "spin",
            Self::Idle => "idle",
            Self::Rest => "rest",
        }
    }

    /// Longest halt, microseconds; 0 if it never halts.
    #[must_use]
    pub fn halt_us(self) -> u32 {
        match self {
            Self::Spin => 0,
            Self::Idle => 1000,
            Self::Rest => 20_000,
        }
    }
}

/// How `corrupt` damages a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Damage {
    /// Flips one bit.
    Bit,
    /// Puts an older generation there.
    Stale,
    /// Puts another page there.
    Foreign,
}

impl Damage {
    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Bit => "bit",
            Self::Stale => "stale",
            Self::Foreign => "foreign",
        }
    }
}

/// One line of the command port. `None` in a field: not given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "README.md documents the commands; the fields are their words")]
pub enum Command {
    Ping,
    Status,
    Dirty { rate: Option<u64>, ws: Option<u64>, entropy: Option<u8>, pattern: Option<Pattern> },
    Populate { entropy: Option<u8> },
    Verify,
    Corrupt { page: Option<u64>, damage: Damage },
    State,
    Gap,
    GapReset,
    Mode(Mode),
    BlkFill { blocks: Option<u64> },
    BlkDirty { rate: u64, ws: Option<u64> },
    BlkFlush,
    BlkVerify,
    Shutdown,
    Panic,
}

impl Command {
    /// Reads a line without its line end.
    ///
    /// # Errors
    /// A text for the sender.
    pub fn parse(line: &str) -> Result<Self, &'static str> {
        let mut words = line.split_ascii_whitespace();
        let command = words.next().ok_or("empty line")?;
        let mut next = words.clone();
        let command = match (command, next.next()) {
            ("gap", Some("reset")) => return end(next, Self::GapReset),
            ("mode", Some(mode)) => {
                let mode = Mode::parse(mode).ok_or("mode is spin, idle or rest")?;
                return end(next, Self::Mode(mode));
            }
            ("blk", Some("flush")) => return end(next, Self::BlkFlush),
            ("blk", Some("verify")) => return end(next, Self::BlkVerify),
            ("blk", Some("fill")) => {
                let options = Options::parse(next, &["blocks"])?;
                return Ok(Self::BlkFill { blocks: options.blocks });
            }
            ("blk", Some("dirty")) => {
                let options = Options::parse(next, &["rate", "ws"])?;
                return Ok(Self::BlkDirty { rate: options.rate.ok_or("rate is missing")?, ws: options.ws });
            }
            (command, _) => command,
        };
        match command {
            "ping" => end(words, Self::Ping),
            "status" => end(words, Self::Status),
            "state" => end(words, Self::State),
            "dirty" => {
                let o = Options::parse(words, &["rate", "ws", "entropy", "pattern"])?;
                Ok(Self::Dirty { rate: o.rate, ws: o.ws, entropy: o.entropy, pattern: o.pattern })
            }
            "populate" => Ok(Self::Populate { entropy: Options::parse(words, &["entropy"])?.entropy }),
            "verify" => end(words, Self::Verify),
            "corrupt" => {
                let o = Options::parse(words, &["page", "kind"])?;
                Ok(Self::Corrupt { page: o.page, damage: o.damage.unwrap_or(Damage::Bit) })
            }
            "gap" => end(words, Self::Gap),
            "shutdown" => end(words, Self::Shutdown),
            "panic" => end(words, Self::Panic),
            _ => Err("unknown command"),
        }
    }
}

fn end<'a>(mut words: impl Iterator<Item = &'a str>, command: Command) -> Result<Command, &'static str> {
    if words.next().is_some() { Err("too many words") } else { Ok(command) }
}

#[derive(Default)]
struct Options {
    rate: Option<u64>,
    ws: Option<u64>,
    entropy: Option<u8>,
    pattern: Option<Pattern>,
    page: Option<u64>,
    damage: Option<Damage>,
    blocks: Option<u64>,
}

impl Options {
    fn parse<'a>(words: impl Iterator<Item = &'a str>, allowed: &[&str]) -> Result<Self, &'static str> {
        let mut options = Self::default();
        for word in words {
            let (key, value) = word.split_once('=').ok_or("expected key=value")?;
            if !allowed.contains(&key) {
                return Err("unknown key");
            }
            let number = value.parse::<u64>().map_err(|_| "expected a number");
            match key {
                "rate" => options.rate = Some(number?),
                "ws" => options.ws = Some(number?),
                "page" => options.page = Some(number?),
                "blocks" => options.blocks = Some(number?),
                "entropy" => {
                    let entropy = u8::try_from(number?).ok().filter(|e| *e <= 100);
                    options.entropy = Some(entropy.ok_or("entropy is 0..100")?);
                }
                "pattern" => options.pattern = Some(Pattern::parse(value).ok_or("pattern is seq or rand")?),
                _ => {
                    options.damage = Some(match value {
                        "bit" => Damage::Bit,
                        "stale" => Damage::Stale,
                        "foreign" => Damage::Foreign,
                        _ => return Err("kind is bit, stale or foreign"),
                    });
                }
            }
        }
        Ok(options)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_commands() {
        assert_eq!(Command::parse("ping"), Ok(Command::Ping));
        assert_eq!(Command::parse(" gap  reset "), Ok(Command::GapReset));
        assert_eq!(Command::parse("gap"), Ok(Command::Gap));
        assert_eq!(Command::parse("mode spin"), Ok(Command::Mode(Mode::Spin)));
        assert_eq!(
            Command::parse("dirty rate=20000 ws=5 entropy=50 pattern=seq"),
            Ok(Command::Dirty {
                rate: Some(20_000),
                ws: Some(5),
                entropy: Some(50),
                pattern: Some(Pattern::Seq)
            })
        );
        assert_eq!(Command::parse("blk dirty rate=3"), Ok(Command::BlkDirty { rate: 3, ws: None }));
        assert_eq!(
            Command::parse("corrupt kind=stale page=9"),
            Ok(Command::Corrupt { page: Some(9), damage: Damage::Stale })
        );
    }

    #[test]
    fn refuses_the_rest() {
        for line in [
            "",
            "pong",
            "ping 1",
            "gap set",
            "mode",
            "mode fast",
            "dirty rate",
            "dirty rate=x",
            "dirty page=1",
            "dirty entropy=101",
            "corrupt kind=all",
            "blk",
            "blk dirty",
            "blk flush now",
            "populate rate=1",
        ] {
            assert!(Command::parse(line).is_err(), "{line}");
        }
    }
}
