//! `launch`, `ls`, `get`, `start`, `stop`, `rm`.

use std::path::Path;
use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use controlplane::api::{LaunchRequest, Machine, MachineList, MachineState, StopRequest};
use controlplane::core::MachineRef;
use serde_json::{Value, json};
use wire::agent::Info;

use super::{guest, keys};
use crate::args::{Act, Launch, Ls, Rm, Stop, Wait};
use crate::client::Client;
use crate::exit::Failure;
use crate::output;
use crate::units::{show_bytes, show_ms};

/// Removing a machine takes its host a moment.
const REMOVE_TIMEOUT: Duration = Duration::from_secs(60);

pub(super) async fn launch(client: &Client, launch: &Launch, json: bool) -> Result<(), Failure> {
    let request = LaunchRequest {
        name: launch.name.clone(),
        vcpus: launch.vcpu,
        ram_bytes: launch.memory,
        kernel: launch.kernel.clone(),
        initrd: launch.initrd.clone(),
        cmdline: launch.cmdline.clone(),
        image: launch.image.clone(),
        disk_bytes: launch.disk,
        ssh_keys: ssh_keys(launch)?,
        env: launch.env.iter().cloned().collect(),
        user_data_base64: launch.user_data.as_deref().map(user_data).transpose()?,
        entrypoint: Some(launch.entrypoint.clone()).filter(|words| !words.is_empty()),
        cpu: launch.cpu.clone(),
        host: launch.host.clone(),
    };
    let machine: Machine = client.post("/v1/machines", &request).await?;
    let host = machine.host.as_ref().map_or_else(String::new, |host| format!(" on {host}"));
    eprintln!("launching {} ({}){host}", machine.name, machine.id);
    let machine = wait_if_asked(client, machine, &launch.wait, MachineState::Started).await?;
    done(&machine, json)
}

/// The keys of the files that were given, and those that are always to be let in.
fn ssh_keys(launch: &Launch) -> Result<Vec<String>, Failure> {
    let mut keys = if launch.image.is_some() { keys::known()? } else { Vec::new() };
    for file in &launch.ssh_key {
        for key in keys::read(file)? {
            if !keys.contains(&key) {
                keys.push(key);
            }
        }
    }
    Ok(keys)
}

fn user_data(file: &Path) -> Result<String, Failure> {
    let bytes = std::fs::read(file).map_err(|error| {
        Failure::local(format!("reading {}", file.display()), error, "give a file that can be read")
    })?;
    Ok(BASE64_STANDARD.encode(bytes))
}

pub(super) async fn start(client: &Client, act: &Act, json: bool) -> Result<(), Failure> {
    let machine: Machine = client.post(&format!("/v1/machines/{}/start", act.machine), &json!({})).await?;
    let machine = wait_if_asked(client, machine, &act.wait, MachineState::Started).await?;
    done(&machine, json)
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

pub(super) async fn stop(client: &Client, stop: &Stop, json: bool) -> Result<(), Failure> {
    let request = StopRequest { force: stop.force, grace_ms: stop.grace.map(millis) };
    let machine: Machine = client.post(&format!("/v1/machines/{}/stop", stop.machine), &request).await?;
    let machine = wait_if_asked(client, machine, &stop.wait, MachineState::Stopped).await?;
    done(&machine, json)
}

/// Waits for the state, unless told not to or it is there already.
async fn wait_if_asked(
    client: &Client,
    machine: Machine,
    wait: &Wait,
    state: MachineState,
) -> Result<Machine, Failure> {
    if wait.detach || machine.state == state {
        return Ok(machine);
    }
    // Whole seconds, rounded up: what the API counts in.
    let seconds = wait.timeout.as_millis().div_ceil(1000);
    let path = format!("/v1/machines/{}/wait?state={state}&timeout={seconds}", machine.id);
    client.get_waiting(&path, wait.timeout).await
}

fn done(machine: &Machine, json: bool) -> Result<(), Failure> {
    if json {
        return output::json(machine);
    }
    let host = machine.host.as_ref().map_or_else(String::new, |host| format!(" on {host}"));
    output::line(&format!(
        "{} ({}) is {}{host}: {}, {}",
        machine.name, machine.id, machine.state, machine.ip4, machine.ip6
    ))
}

pub(super) async fn list(client: &Client, ls: &Ls, json: bool) -> Result<(), Failure> {
    let mut path = "/v1/machines?limit=1000".to_owned();
    if let Some(host) = &ls.host {
        path.push_str(&format!("&host={host}"));
    }
    if let Some(state) = ls.state {
        path.push_str(&format!("&state={state}"));
    }
    let mut all = MachineList { machines: Vec::new(), next_cursor: None };
    let mut cursor = None;
    loop {
        let page: MachineList = match &cursor {
            None => client.get(&path).await?,
            Some(cursor) => client.get(&format!("{path}&cursor={cursor}")).await?,
        };
        all.machines.extend(page.machines);
        cursor = page.next_cursor;
        if cursor.is_none() {
            break;
        }
    }
    if json {
        return output::json(&all);
    }
    let rows: Vec<_> = all.machines.iter().map(row).collect();
    output::table(&["NAME", "ID", "STATE", "HOST", "VCPU", "MEMORY", "IP4", "IP6", "UPTIME"], &rows)
}

fn row(machine: &Machine) -> Vec<String> {
    let state = match &machine.migration {
        Some(migration) => format!("{} (to {})", machine.state, migration.target),
        None => machine.state.to_string(),
    };
    vec![
        machine.name.to_string(),
        machine.id.to_string(),
        state,
        machine.host.as_ref().map_or_else(|| "-".to_owned(), ToString::to_string),
        machine.vcpus.to_string(),
        show_bytes(machine.ram_bytes),
        machine.ip4.to_string(),
        machine.ip6.to_string(),
        machine.uptime_ms.map_or_else(|| "-".to_owned(), show_ms),
    ]
}

pub(super) async fn get(client: &Client, machine: &MachineRef, json: bool) -> Result<(), Failure> {
    let shown: Machine = client.get(&format!("/v1/machines/{machine}")).await?;
    let runs = shown.state == MachineState::Started && shown.image.is_some();
    let guest = if runs { guest::info(client, machine).await } else { None };
    let machine = shown;
    if json {
        return output::json(&with_guest(&machine, guest.as_ref())?);
    }
    let mut pairs = vec![
        ("name", machine.name.to_string()),
        ("id", machine.id.to_string()),
        ("state", machine.state.to_string()),
    ];
    if let Some(reason) = &machine.reason {
        pairs.push(("reason", format!("{} ({})", reason.detail, reason.code)));
    }
    pairs.extend([
        ("host", machine.host.as_ref().map_or_else(|| "-".to_owned(), ToString::to_string)),
        ("epoch", machine.epoch.to_string()),
        ("vcpus", machine.vcpus.to_string()),
        ("memory", show_bytes(machine.ram_bytes)),
        ("ip4", machine.ip4.to_string()),
        ("ip6", machine.ip6.to_string()),
        ("mac", machine.mac.clone()),
        ("cpu", machine.cpu.clone()),
        ("image", machine.image.clone().unwrap_or_else(|| "-".to_owned())),
        ("disk", machine.disk_bytes.map_or_else(|| "-".to_owned(), show_bytes)),
        ("kernel", machine.kernel.clone()),
        ("initrd", machine.initrd.clone().unwrap_or_else(|| "-".to_owned())),
        ("cmdline", machine.cmdline.clone()),
        ("uptime", machine.uptime_ms.map_or_else(|| "-".to_owned(), show_ms)),
    ]);
    if let Some(migration) = &machine.migration {
        let shown = format!("{} to {}, {}", migration.id, migration.target, migration.phase.as_str());
        pairs.push(("migration", shown));
    }
    if let Some(guest) = &guest {
        pairs.extend(guest_pairs(guest));
    }
    output::pairs(&pairs)
}

/// The machine with what its guest says in `guest`.
fn with_guest(machine: &Machine, guest: Option<&Info>) -> Result<Value, Failure> {
    let mut value = serde_json::to_value(machine)
        .map_err(|error| Failure::local("writing JSON", error, "report this as a defect"))?;
    if let (Some(guest), Value::Object(fields)) = (guest, &mut value) {
        let load: Vec<f64> = guest.load_milli.iter().map(|milli| f64::from(*milli) / 1000.0).collect();
        let shown = json!({
            "boot_id": guest.boot_id, "uptime_ms": guest.uptime_ms, "load": load,
            "memory_bytes": guest.memory_bytes, "memory_available_bytes": guest.memory_available_bytes,
            "hostname": guest.hostname, "kernel": guest.kernel, "agent": guest.agent, "addresses": guest.addresses,
        });
        fields.insert("guest".to_owned(), shown);
    }
    Ok(value)
}

fn guest_pairs(guest: &Info) -> Vec<(&'static str, String)> {
    let [one, five, fifteen] = guest.load_milli.map(|milli| f64::from(milli) / 1000.0);
    vec![
        ("guest uptime", show_ms(guest.uptime_ms)),
        ("guest load", format!("{one:.2} {five:.2} {fifteen:.2}")),
        (
            "guest memory",
            format!(
                "{} available of {}",
                show_bytes(guest.memory_available_bytes),
                show_bytes(guest.memory_bytes)
            ),
        ),
        ("guest kernel", guest.kernel.clone()),
        ("guest boot id", guest.boot_id.clone()),
    ]
}

pub(super) async fn remove(client: &Client, rm: &Rm, json: bool) -> Result<(), Failure> {
    // The name may be taken again at once, so that the wait is for the id.
    let before: Machine = client.get(&format!("/v1/machines/{}", rm.machine)).await?;
    let path = format!("/v1/machines/{}", before.id);
    let force = if rm.force { "?force=true" } else { "" };
    let answer: Value = client.delete(&format!("{path}{force}")).await?;
    if answer.get("state").and_then(Value::as_str) != Some(MachineState::Destroyed.as_str()) {
        let wait = format!("{path}/wait?state=destroyed&timeout={}", REMOVE_TIMEOUT.as_secs());
        client.get_waiting::<Value>(&wait, REMOVE_TIMEOUT).await?;
    }
    if json {
        let state = MachineState::Destroyed;
        return output::json(
            &json!({"id": before.id.to_string(), "name": before.name.to_string(), "state": state}),
        );
    }
    eprintln!("removed {} ({})", before.name, before.id);
    Ok(())
}
