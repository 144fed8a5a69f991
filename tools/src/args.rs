//! What can be typed.

mod images;

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use controlplane::api::MachineState;
use controlplane::core::MachineRef;
use wire::ids::{HostName, MachineName, MigrationId};

pub use images::{BuildImage, Image, ImagePart, ImportImage, Store};

use crate::session::copy::Place;
use crate::units::{parse_duration, parse_memory};

/// Launches, moves and looks after machines that never have to restart.
#[derive(Debug, Parser)]
#[command(
    name = "mashines",
    version,
    after_help = "Exit codes: 0 done, 1 local failure, 2 usage, 3 not found, 4 conflict, 5 refused or failed, 6 timeout, 7 control plane not reached, 130 interrupted (what was begun goes on).\nThe control plane is found by MASHINES_URL and MASHINES_TOKEN, or by what `mashines login` wrote."
)]
pub struct Cli {
    /// Print data as JSON.
    #[arg(long, global = true)]
    pub json: bool,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a fleet's keys.
    #[command(subcommand)]
    Fleet(Fleet),
    /// Remember where the control plane is.
    Login(Login),
    /// Create a machine and boot it.
    Launch(Launch),
    /// List machines.
    Ls(Ls),
    /// Show one machine.
    Get(One),
    /// Move a running machine to another host.
    Migrate(Migrate),
    /// List migrations, show or cancel one.
    Migrations(Migrations),
    /// Show what happened.
    Events(Events),
    /// Run a command in a machine; it goes on while the machine moves. Exits with the command's code.
    Exec(Execute),
    /// A shell in a machine; it stays open while the machine moves.
    Enter(Enter),
    /// Copy files to or from a machine: `mashines cp FILE NAME:/path`, `mashines cp NAME:/path FILE`.
    Cp(Copy),
    /// Show a machine's serial console, or its journal.
    Logs(Logs),
    /// End a machine; its disks, name and addresses stay.
    Stop(Stop),
    /// Boot a stopped machine again.
    Start(Act),
    /// Remove a machine.
    Rm(Rm),
    /// SSH keys for machines launched from here.
    #[command(subcommand)]
    Key(Key),
    /// Look at hosts.
    #[command(subcommand)]
    Host(Host),
    /// Make, import, list and remove images, in a directory of this machine.
    #[command(subcommand)]
    Image(Image),
}

/// `fleet`.
#[derive(Debug, Subcommand)]
pub enum Fleet {
    /// Make the authority, the control plane's identity, its token, and identities of hosts.
    Init {
        /// Where to put them.
        #[arg(long, value_name = "DIR", default_value = "fleet")]
        dir: PathBuf,
        /// Also make an identity for this host; may be repeated.
        #[arg(long = "host", value_name = "NAME")]
        hosts: Vec<HostName>,
    },
    /// Make the identity of a host, in DIR/hosts/NAME, to be taken to that host.
    HostCert {
        /// The host's name.
        name: HostName,
        /// Directory that `fleet init` made.
        #[arg(long, value_name = "DIR", default_value = "fleet")]
        dir: PathBuf,
    },
}

/// `login`.
#[derive(Debug, Args)]
pub struct Login {
    /// http://IP:PORT or unix:PATH.
    pub url: String,
    /// File with the token (`token` in the fleet directory); `-` reads standard input.
    #[arg(long, value_name = "FILE")]
    pub token_file: Option<PathBuf>,
}

/// `launch`.
#[derive(Debug, Args)]
pub struct Launch {
    /// Name; made up when absent.
    #[arg(long)]
    pub name: Option<MachineName>,
    /// vCPUs.
    #[arg(long, visible_alias = "vcpus", value_name = "N", default_value_t = 1)]
    pub vcpu: u32,
    /// RAM, for example 512M or 1G.
    #[arg(long, value_name = "SIZE", default_value = "1G", value_parser = parse_memory)]
    pub memory: u64,
    /// Image to make it from; see `mashines image ls`.
    #[arg(long, value_name = "IMAGE", conflicts_with_all = ["kernel", "initrd"])]
    pub image: Option<String>,
    /// Size of its root disk, for example 8G; the image's own size when absent.
    #[arg(long, value_name = "SIZE", value_parser = parse_memory, requires = "image")]
    pub disk: Option<u64>,
    /// File with SSH public keys that may log in as root, besides those of `mashines key add`; may be repeated.
    #[arg(long, value_name = "FILE", requires = "image")]
    pub ssh_key: Vec<PathBuf>,
    /// Environment of its first process; may be repeated.
    #[arg(long, value_name = "NAME=VALUE", value_parser = parse_variable, requires = "image")]
    pub env: Vec<(String, String)>,
    /// File with user data for cloud-init.
    #[arg(long, value_name = "FILE", requires = "image")]
    pub user_data: Option<PathBuf>,
    /// CPU that it sees: host, x86-64-v2, x86-64-v3 or x86-64-v4.
    #[arg(long, value_name = "PROFILE")]
    pub cpu: Option<String>,
    /// Kernel to boot (PVH ELF or bzImage), a path on the host; the control plane has a default.
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<String>,
    /// Initial RAM disk, a path on the host.
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<String>,
    /// Kernel command line.
    #[arg(long, value_name = "TEXT")]
    pub cmdline: Option<String>,
    /// Host to run on; chosen when absent.
    #[arg(long, value_name = "HOST")]
    pub host: Option<HostName>,
    /// Wait until it runs.
    #[command(flatten)]
    pub wait: Wait,
    /// What to run in an image that has no init, instead of what the image says.
    #[arg(last = true, value_name = "COMMAND", requires = "image")]
    pub entrypoint: Vec<String>,
}

/// Whether to wait.
#[derive(Debug, Args)]
pub struct Wait {
    /// Wait until it is done (the default).
    #[arg(long, conflicts_with = "detach")]
    pub wait: bool,
    /// Return at once.
    #[arg(long)]
    pub detach: bool,
    /// How long to wait.
    #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = parse_duration)]
    pub timeout: Duration,
}

/// `ls`.
#[derive(Debug, Args)]
pub struct Ls {
    /// Only machines on this host.
    #[arg(long)]
    pub host: Option<HostName>,
    /// Only machines in this state.
    #[arg(long)]
    pub state: Option<MachineState>,
}

/// A machine.
#[derive(Debug, Args)]
pub struct One {
    /// Name or id.
    #[arg(value_name = "MACHINE")]
    pub machine: MachineRef,
}

/// `stop`.
#[derive(Debug, Args)]
pub struct Stop {
    /// Name or id.
    #[arg(value_name = "MACHINE")]
    pub machine: MachineRef,
    /// End it at once instead of asking its guest to shut down.
    #[arg(long)]
    pub force: bool,
    /// How long the guest has to shut down before it is ended.
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, conflicts_with = "force")]
    pub grace: Option<Duration>,
    /// Wait until it is done.
    #[command(flatten)]
    pub wait: Wait,
}

/// `key`.
#[derive(Debug, Subcommand)]
pub enum Key {
    /// Let the keys of a file log in as root to every machine launched from now on.
    Add {
        /// A .pub file; `-` reads standard input.
        file: PathBuf,
    },
    /// List them.
    Ls,
    /// Remove one, by its comment or its number in the list.
    Rm {
        /// Comment or number.
        key: String,
    },
}

/// `start`.
#[derive(Debug, Args)]
pub struct Act {
    /// Name or id.
    #[arg(value_name = "MACHINE")]
    pub machine: MachineRef,
    /// Wait until it is done.
    #[command(flatten)]
    pub wait: Wait,
}

/// `migrate`.
#[derive(Debug, Args)]
pub struct Migrate {
    /// Name or id.
    #[arg(value_name = "MACHINE")]
    pub machine: MachineRef,
    /// Where to; chosen when absent.
    #[arg(long, value_name = "HOST")]
    pub to: Option<HostName>,
    /// Longest pause to aim for.
    #[arg(long, value_name = "DURATION", default_value = "10ms", value_parser = parse_duration)]
    pub downtime_budget: Duration,
    /// Limit of the copy in bytes per second, for example 100M.
    #[arg(long, value_name = "SIZE", value_parser = crate::units::parse_size)]
    pub bandwidth_limit: Option<u64>,
    /// Return at once instead of showing progress.
    #[arg(long)]
    pub detach: bool,
}

/// `migrations`.
#[derive(Debug, Args)]
pub struct Migrations {
    /// Only those of this machine.
    #[arg(long)]
    pub machine: Option<MachineRef>,
    /// Most to show.
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub limit: u16,
    /// What to do with one.
    #[command(subcommand)]
    pub command: Option<OneMigration>,
}

/// `migrations get`, `migrations cancel`.
#[derive(Debug, Subcommand)]
pub enum OneMigration {
    /// Show one; with --watch, follow it to its end.
    Get {
        /// Its id.
        id: MigrationId,
        /// Show progress until it ends.
        #[arg(long)]
        watch: bool,
    },
    /// Cancel one; the machine stays where it is.
    Cancel {
        /// Its id.
        id: MigrationId,
    },
}

/// `events`.
#[derive(Debug, Args)]
pub struct Events {
    /// Go on with what happens from now on.
    #[arg(short, long)]
    pub follow: bool,
    /// Only events after this one; with --follow the default is now, else the beginning.
    #[arg(long, value_name = "ID")]
    pub after: Option<u64>,
}

/// `exec`.
#[derive(Debug, Args)]
pub struct Execute {
    /// Name or id.
    #[arg(value_name = "MACHINE")]
    pub machine: MachineRef,
    /// Give the command a terminal.
    #[arg(short, long)]
    pub tty: bool,
    /// Pass standard input on also from a terminal; a pipe's and a file's is passed on anyway.
    #[arg(short, long)]
    pub interactive: bool,
    /// Pass no standard input on; for loops that read their own.
    #[arg(short, long, conflicts_with_all = ["interactive", "tty"])]
    pub no_stdin: bool,
    /// User to run it as; root when absent.
    #[arg(short, long)]
    pub user: Option<String>,
    /// Directory to start in; the user's home when absent.
    #[arg(short, long, value_name = "DIR")]
    pub workdir: Option<String>,
    /// Environment; may be repeated.
    #[arg(short, long, value_name = "NAME=VALUE", value_parser = parse_variable)]
    pub env: Vec<(String, String)>,
    /// Command and arguments.
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub command: Vec<String>,
}

/// `enter`.
#[derive(Debug, Args)]
pub struct Enter {
    /// Name or id.
    #[arg(value_name = "MACHINE")]
    pub machine: MachineRef,
    /// User; root when absent.
    #[arg(short, long)]
    pub user: Option<String>,
}

/// `cp`.
#[derive(Debug, Args)]
pub struct Copy {
    /// Directories are copied whole with and without it.
    #[arg(short, long)]
    pub recursive: bool,
    /// File or directory; `NAME:/path` in a machine.
    pub from: Place,
    /// Where to.
    pub to: Place,
}

/// `logs`.
#[derive(Debug, Args)]
pub struct Logs {
    /// Name or id.
    #[arg(value_name = "MACHINE")]
    pub machine: MachineRef,
    /// Go on as the machine writes, also while and after it moves.
    #[arg(short, long)]
    pub follow: bool,
    /// Begin at this byte, counted over the machine's whole life.
    #[arg(long, value_name = "BYTE", default_value_t = 0)]
    pub offset: u64,
    /// The guest's journal instead, through its agent; for images with systemd.
    #[arg(short, long, conflicts_with = "offset")]
    pub journal: bool,
    /// Only messages of this unit; may be repeated.
    #[arg(short, long = "unit", value_name = "UNIT", requires = "journal")]
    pub unit: Vec<String>,
    /// Only the newest messages, this many; all when absent.
    #[arg(short = 'n', long, value_name = "N", requires = "journal")]
    pub lines: Option<u32>,
}

/// `rm`.
#[derive(Debug, Args)]
pub struct Rm {
    /// Name or id.
    #[arg(value_name = "MACHINE")]
    pub machine: MachineRef,
    /// Also a running one, at once.
    #[arg(long)]
    pub force: bool,
}

/// `host`.
#[derive(Debug, Subcommand)]
pub enum Host {
    /// List hosts.
    Ls,
    /// Show one.
    Get {
        /// Its name.
        name: HostName,
    },
}

/// Parses `NAME=VALUE`.
fn parse_variable(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err(format!("`{text}` is no variable: write NAME=VALUE")),
    }
}
