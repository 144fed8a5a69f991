//! What each command does.

mod events;
mod fleet;
mod guest;
mod hosts;
mod images;
mod keys;
mod logs;
mod machines;
mod migrations;
mod progress;

use crate::args::{Cli, Command};
use crate::client::Client;
use crate::config::Config;
use crate::exit::Failure;

/// Runs a command line.
///
/// # Errors
/// [`Failure`], which knows its exit code and remedy.
pub async fn run(cli: Cli) -> Result<(), Failure> {
    let json = cli.json;
    match cli.command {
        Command::Fleet(command) => return fleet::run(&command, json),
        Command::Login(login) => return fleet::login(&login, json).await,
        Command::Image(command) => return images::run(command, json).await,
        Command::Key(command) => return keys::run(&command, json),
        _ => {}
    }
    let client = Client::new(&Config::load()?)?;
    match cli.command {
        // Done above: they need no control plane, or set it.
        Command::Fleet(_) | Command::Login(_) | Command::Image(_) | Command::Key(_) => Ok(()),
        Command::Launch(launch) => machines::launch(&client, &launch, json).await,
        Command::Ls(ls) => machines::list(&client, &ls, json).await,
        Command::Get(one) => machines::get(&client, &one.machine, json).await,
        Command::Migrate(migrate) => migrations::migrate(&client, &migrate, json).await,
        Command::Migrations(command) => migrations::run(&client, &command, json).await,
        Command::Events(events) => events::run(&client, &events, json).await,
        Command::Exec(execute) => guest::exec(&client, &execute).await,
        Command::Enter(enter) => guest::enter(&client, &enter).await,
        Command::Cp(copy) => guest::copy(&client, &copy, json).await,
        Command::Logs(logs) if logs.journal => guest::journal(&client, &logs, json).await,
        Command::Logs(logs) => logs::run(&client, &logs).await,
        Command::Stop(act) => machines::stop(&client, &act, json).await,
        Command::Start(act) => machines::start(&client, &act, json).await,
        Command::Rm(rm) => machines::remove(&client, &rm, json).await,
        Command::Host(host) => hosts::run(&client, &host, json).await,
    }
}
