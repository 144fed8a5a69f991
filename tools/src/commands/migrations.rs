//! `migrate`, `migrations`.

use controlplane::api::{MigrateRequest, Migration, MigrationList, Phase};
use serde_json::json;
use wire::ids::MigrationId;

use super::progress::Progress;
use crate::args::{Migrate, Migrations, OneMigration};
use crate::client::Client;
use crate::exit::Failure;
use crate::output;
use crate::sse::Events;
use crate::units::{show_bytes, show_ms, show_us};

pub(super) async fn migrate(client: &Client, migrate: &Migrate, json: bool) -> Result<(), Failure> {
    let budget = u64::try_from(migrate.downtime_budget.as_micros()).unwrap_or(u64::MAX);
    let request = MigrateRequest {
        target: migrate.to.clone(),
        downtime_budget_us: Some(budget),
        bandwidth_limit_bytes_per_s: migrate.bandwidth_limit,
    };
    let path = format!("/v1/machines/{}/migrate", migrate.machine);
    let migration: Migration = client.post(&path, &request).await?;
    if migrate.detach {
        eprintln!(
            "migration {} from {} to {} is under way; watch it with `mashines migrations get {} --watch`",
            migration.id, migration.source, migration.target, migration.id
        );
        return if json { output::json(&migration) } else { output::line(&migration.id.to_string()) };
    }
    follow_to_end(client, migration.id, json).await
}

pub(super) async fn run(client: &Client, command: &Migrations, json: bool) -> Result<(), Failure> {
    match &command.command {
        None => list(client, command, json).await,
        Some(OneMigration::Get { id, watch: true }) => follow_to_end(client, *id, json).await,
        Some(OneMigration::Get { id, watch: false }) => {
            let migration: Migration = client.get(&format!("/v1/migrations/{id}")).await?;
            if json { output::json(&migration) } else { show(&migration) }
        }
        Some(OneMigration::Cancel { id }) => {
            let path = format!("/v1/migrations/{id}/cancel");
            let migration: Migration = client.post(&path, &json!({})).await?;
            eprintln!(
                "asked to cancel; the machine stays on {} unless it has moved already",
                migration.source
            );
            let migration =
                if migration.phase.is_terminal() { migration } else { watch(client, *id, false).await? };
            if json {
                output::json(&migration)?;
            } else {
                output::line(&format!("{id} {}", migration.phase.as_str()))?;
            }
            if migration.phase == Phase::Succeeded {
                return Err(Failure::Failed {
                    detail: format!(
                        "too late: machine {} runs on {} now",
                        migration.machine_name, migration.target
                    ),
                    remedy: format!("move it back with `mashines migrate {}`", migration.machine_name),
                });
            }
            Ok(())
        }
    }
}

/// Shows progress until the migration has ended; Ctrl-C leaves it to itself.
async fn follow_to_end(client: &Client, id: MigrationId, json: bool) -> Result<(), Failure> {
    let migration = tokio::select! {
        ended = watch(client, id, true) => ended?,
        interrupted = tokio::signal::ctrl_c() => {
            interrupted.map_err(|error| Failure::local("listening for Ctrl-C", error, "use --detach"))?;
            eprintln!("detached: the migration goes on");
            eprintln!("  watch it:  mashines migrations get {id} --watch");
            eprintln!("  cancel it: mashines migrations cancel {id}");
            return Err(Failure::Interrupted);
        }
    };
    if json {
        output::json(&migration)?;
    }
    match migration.phase {
        Phase::Succeeded if json => Ok(()),
        Phase::Succeeded => output::line(&summary(&migration)),
        Phase::Cancelled => Err(Failure::Failed {
            detail: format!(
                "the migration was cancelled; {} stays on {}",
                migration.machine_name, migration.source
            ),
            remedy: format!("start it again with `mashines migrate {}`", migration.machine_name),
        }),
        _ => {
            let why = migration.error.as_ref().map_or("", |error| error.detail.as_str());
            Err(Failure::Failed {
                detail: format!(
                    "machine {} was not moved to {}: {why}",
                    migration.machine_name, migration.target
                ),
                remedy: format!(
                    "see `mashines get {}` and `mashines host ls`, then try again or another host",
                    migration.machine_name
                ),
            })
        }
    }
}

/// Follows the migration to its end. A stream that breaks is taken up again.
async fn watch(client: &Client, id: MigrationId, show: bool) -> Result<Migration, Failure> {
    let mut progress = Progress::new(show);
    loop {
        let response = client.open(&format!("/v1/migrations/{id}/watch"), None).await?;
        let mut events = Events::new(response);
        loop {
            match events.next(client).await {
                Ok(Some(event)) => {
                    let migration: Migration = serde_json::from_str(&event.data)
                        .map_err(|error| Failure::Answer(error.to_string()))?;
                    progress.show(&migration);
                    if migration.phase.is_terminal() {
                        progress.finish();
                        return Ok(migration);
                    }
                }
                Ok(None) => break,
                // The control plane may be restarting: the next attempt tells, and fails with its reason if not.
                Err(Failure::Unreachable { .. }) => {
                    progress.note("lost the control plane; the hosts go on by themselves. Trying again");
                    progress.pause_before_retry().await?;
                    break;
                }
                Err(failure) => return Err(failure),
            }
        }
    }
}

fn summary(migration: &Migration) -> String {
    let moved = format!("moved {} from {} to {}", migration.machine_name, migration.source, migration.target);
    match &migration.timings {
        None => moved,
        Some(times) => format!(
            "{moved}: pause {}, {} in all, {} in {} rounds",
            show_us(times.pause_us),
            show_ms(times.total_ms),
            show_bytes(times.sent_bytes),
            times.rounds
        ),
    }
}

async fn list(client: &Client, command: &Migrations, json: bool) -> Result<(), Failure> {
    let mut path = format!("/v1/migrations?limit={}", command.limit);
    if let Some(machine) = &command.machine {
        path.push_str(&format!("&machine={machine}"));
    }
    let list: MigrationList = client.get(&path).await?;
    if json {
        return output::json(&list);
    }
    let rows: Vec<_> = list.migrations.iter().map(row).collect();
    output::table(&["ID", "MACHINE", "FROM", "TO", "PHASE", "PAUSE", "TOTAL", "SENT"], &rows)
}

fn row(migration: &Migration) -> Vec<String> {
    let times = migration.timings.as_ref();
    let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    vec![
        migration.id.to_string(),
        migration.machine_name.to_string(),
        migration.source.to_string(),
        migration.target.to_string(),
        migration.phase.as_str().to_owned(),
        or_dash(times.map(|times| show_us(times.pause_us))),
        or_dash(times.map(|times| show_ms(times.total_ms))),
        or_dash(times.map(|times| show_bytes(times.sent_bytes))),
    ]
}

fn show(migration: &Migration) -> Result<(), Failure> {
    let mut pairs = vec![
        ("id", migration.id.to_string()),
        ("machine", format!("{} ({})", migration.machine_name, migration.machine)),
        ("from", migration.source.to_string()),
        ("to", migration.target.to_string()),
        ("phase", migration.phase.as_str().to_owned()),
        ("downtime budget", show_us(migration.downtime_budget_us)),
    ];
    if let Some(message) = &migration.message {
        pairs.push(("message", message.clone()));
    }
    if let Some(error) = &migration.error {
        pairs.push(("error", format!("{} ({})", error.detail, error.code)));
    }
    if let Some(progress) = &migration.progress {
        pairs.push(("progress", super::progress::describe(progress)));
    }
    if let Some(times) = &migration.timings {
        pairs.push(("total", show_ms(times.total_ms)));
        pairs.push(("sent", format!("{} in {} rounds", show_bytes(times.sent_bytes), times.rounds)));
        pairs.push(("pause", show_us(times.pause_us)));
        for (name, us) in [
            ("  stop", times.stop_us),
            ("  harvest", times.harvest_us),
            ("  final copy", times.final_copy_us),
            ("  save", times.save_us),
            ("  restore", times.restore_us),
            ("  resume", times.resume_us),
        ] {
            pairs.push((name, show_us(us)));
        }
        pairs.push(("packets held", times.packets_held.to_string()));
    }
    output::pairs(&pairs)
}
