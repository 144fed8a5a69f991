//! `mashines-control`: serves the REST API to clients and takes in hosts.

use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::Parser;
use controlplane::core::{Config, Handle, Ipv4Pool, Ipv6Pool, Pools};
use controlplane::hosts::Server;
use controlplane::rest::{self, Access, Token};
use controlplane::store::{RedbStore, StoreOptions};
use tokio::net::{TcpListener, UnixListener};
use tokio::signal::unix::{SignalKind, signal};

/// The control plane of a fleet of mashines hosts.
#[derive(Debug, Parser)]
#[command(name = "mashines-control", version)]
struct Options {
    /// Directory of the store.
    #[arg(long, value_name = "DIR")]
    state: PathBuf,
    /// Directory that `mashines fleet init` made: its `token` and the identity in control/ are read.
    #[arg(long, value_name = "DIR")]
    fleet: PathBuf,
    /// Address of the REST API (plain HTTP: keep it on loopback, or put TLS in front), or unix:PATH, which only this user may
    /// then connect to, without a token.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:7070")]
    listen: Listen,
    /// Address that hosts dial in to (QUIC, so UDP).
    #[arg(long, value_name = "ADDRESS", default_value = "[::]:7071")]
    fleet_listen: SocketAddr,
    /// IPv4 addresses of machines.
    #[arg(long, value_name = "ADDRESS/PREFIX", default_value = "198.19.0.0/16")]
    ip4_pool: Ipv4Pool,
    /// IPv6 addresses of machines.
    #[arg(long, value_name = "ADDRESS/PREFIX", default_value = "2001:db8:6d61::/64")]
    ip6_pool: Ipv6Pool,
    /// Kernel (a path on the hosts) of machines whose launch names none.
    #[arg(long, value_name = "FILE")]
    default_kernel: Option<String>,
    /// Directory of images, as `mashines image` fills it; hosts fetch from it what they lack.
    #[arg(long, value_name = "DIR", env = "MASHINES_IMAGES", default_value = "/var/lib/mashines/images")]
    images: PathBuf,
    /// How often hosts send heartbeats; silent for three of them they count as lost.
    #[arg(long, value_name = "MS", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(50..=60_000))]
    heartbeat_ms: u32,
    /// Migrations that one host takes part in at once.
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..))]
    migrations_per_host: u16,
    /// vCPUs that a host takes per physical CPU.
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..))]
    vcpus_per_cpu: u32,
    /// How long a source passes on late packets of a machine that has moved.
    #[arg(long, value_name = "MS", default_value_t = 2000)]
    forward_ms: u64,
}

/// Where the REST API listens.
#[derive(Debug, Clone)]
enum Listen {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

impl std::str::FromStr for Listen {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix("unix:") {
            Some(path) => Ok(Self::Unix(path.into())),
            None => text.parse().map(Self::Tcp).map_err(|error| format!("{error}; use IP:PORT or unix:PATH")),
        }
    }
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env("MASHINES_LOG").unwrap_or_else(|_| "info".into()),
        )
        .init();
    let trust = load_trust(&options.fleet)?;
    let token = Token::read(&options.fleet.join("token"))?;
    std::fs::create_dir_all(&options.state)
        .with_context(|| format!("making the state directory {}", options.state.display()))?;
    let path = options.state.join("control.redb");
    let store = RedbStore::open(&path, StoreOptions::default()).with_context(|| {
        format!("opening {} (is another mashines-control running on this state directory?)", path.display())
    })?;
    let (core, stopped) = Handle::start(Box::new(store), config(&options)).context("taking up the store")?;
    let hosts = Server::start(options.fleet_listen, &trust, core.clone(), &options.images)?;
    tracing::info!(address = %hosts.address(), "hosts may dial in");
    let rest = tokio::spawn(serve_rest(options.listen, core, token, options.images));
    let mut terminate = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
    tokio::select! {
        error = stopped => match error.ok().flatten() {
            Some(error) => Err(error).context("the store failed; start again when it can be written"),
            None => Ok(()),
        },
        ended = rest => ended.context("the REST server ended")?,
        _ = terminate.recv() => Ok(()),
        interrupted = tokio::signal::ctrl_c() => interrupted.context("listening for Ctrl-C"),
    }
}

fn config(options: &Options) -> Config {
    Config {
        pools: Pools::new(options.ip4_pool, options.ip6_pool),
        default_kernel: options.default_kernel.clone(),
        heartbeat_ms: options.heartbeat_ms,
        migrations_per_host: usize::from(options.migrations_per_host),
        vcpus_per_cpu: options.vcpus_per_cpu,
        forward_ms: options.forward_ms,
        ..Config::default()
    }
}

/// The identity lies in `control/` of the fleet directory.
fn load_trust(fleet: &Path) -> anyhow::Result<pki::Trust> {
    pki::Trust::load(&fleet.join("control")).with_context(|| {
        format!(
            "no usable fleet in {}; make one with `mashines fleet init --dir {}`",
            fleet.display(),
            fleet.display()
        )
    })
}

async fn serve_rest(listen: Listen, core: Handle, token: Token, images: PathBuf) -> anyhow::Result<()> {
    match listen {
        Listen::Tcp(address) => {
            let listener = TcpListener::bind(address)
                .await
                .with_context(|| format!("cannot listen on {address} for the REST API"))?;
            tracing::info!(address = %listener.local_addr()?, "REST API");
            warp::serve(rest::routes(core, Access::Token(token), images.into()))
                .incoming(listener)
                .run()
                .await;
        }
        Listen::Unix(path) => {
            remove_stale_socket(&path)?;
            let listener = UnixListener::bind(&path)
                .with_context(|| format!("cannot listen on {} for the REST API", path.display()))?;
            // Until here the umask keeps others out: connecting needs write permission, which the usual ones take away.
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))
                .with_context(|| format!("setting the mode of {}", path.display()))?;
            tracing::info!(path = %path.display(), "REST API");
            warp::serve(rest::routes(core, Access::SocketMode, images.into())).incoming(listener).run().await;
        }
    }
    Ok(())
}

/// A socket that an earlier run left behind is in the way; anything else at that path is not ours to remove.
fn remove_stale_socket(path: &Path) -> anyhow::Result<()> {
    match std::fs::symlink_metadata(path) {
        Ok(metadata) if metadata.file_type().is_socket() => {
            std::fs::remove_file(path).with_context(|| format!("removing the old socket {}", path.display()))
        }
        Ok(_) => anyhow::bail!("{} exists and is no socket", path.display()),
        Err(_) => Ok(()),
    }
}
