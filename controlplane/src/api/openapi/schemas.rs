//! Schemas of the document.

use serde_json::{Map, Value, json};

use super::schema;
use crate::api::{MachineState, Phase};

pub(super) fn schemas() -> Value {
    let mut all = Map::new();
    for (name, value) in requests().into_iter().chain(machines()).chain(migrations()).chain(others()) {
        all.insert(name.to_owned(), value);
    }
    all.into()
}

type Schema = (&'static str, Value);

fn requests() -> Vec<Schema> {
    let launch = [
        ("name", text("Name, unique in the fleet: a DNS label. Made up when absent.")),
        ("vcpus", number("vCPUs, 1 to 64.")),
        ("ram_bytes", number("RAM: a multiple of 2 MiB from 16 MiB.")),
        ("kernel", text("Kernel (PVH ELF) on the host; the control plane's default when absent.")),
        ("initrd", text("Initial RAM disk on the host.")),
        ("cmdline", text("Kernel command line.")),
        ("image", text("Image to make it from; see `/v1/images`.")),
        ("disk_bytes", number("Size of its root disk; the image's own when absent.")),
        ("ssh_keys", json!({"type": "array", "items": {"type": "string"}})),
        ("env", json!({"type": "object", "additionalProperties": {"type": "string"}})),
        ("user_data_base64", text("User data for cloud-init.")),
        ("entrypoint", json!({"type": "array", "items": {"type": "string"}})),
        ("cpu", text("CPU profile: host, x86-64-v2, x86-64-v3 or x86-64-v4.")),
        ("host", text("Host to run on; chosen when absent.")),
    ];
    let migrate = [
        ("target", text("Where to; chosen when absent.")),
        ("downtime_budget_us", number("Longest pause to aim for; 10,000 when absent.")),
        ("bandwidth_limit_bytes_per_s", number("Limit of the pre-copy; 0 or absent for none.")),
    ];
    let stop = [
        ("force", json!({"type": "boolean", "description": "End it at once."})),
        ("grace_ms", number("How long the guest has to shut down; 30,000 when absent.")),
    ];
    vec![
        ("StopRequest", closed(&stop, &[])),
        ("LaunchRequest", closed(&launch, &["vcpus", "ram_bytes"])),
        ("MigrateRequest", closed(&migrate, &[])),
        ("Nothing", closed(&[], &[])),
    ]
}

fn machines() -> Vec<Schema> {
    let states: Vec<_> = MachineState::ALL.iter().map(|state| state.as_str()).collect();
    let machine = [
        ("id", text("Id, for life.")),
        ("name", text("Name.")),
        ("state", schema("MachineState")),
        ("reason", nullable(schema("Reason"))),
        ("host", nullable(text("The host that owns it."))),
        ("epoch", number("Ownership epoch; grows with each move.")),
        ("vcpus", number("vCPUs.")),
        ("ram_bytes", number("RAM.")),
        ("ip4", text("IPv4 address, for life.")),
        ("ip6", text("IPv6 address, for life.")),
        ("mac", text("MAC address.")),
        ("kernel", text("Kernel on the host.")),
        ("initrd", nullable(text("Initial RAM disk on the host."))),
        ("cmdline", text("Kernel command line as given.")),
        ("image", nullable(text("The image it was made from."))),
        ("disk_bytes", nullable(number("Size of its root disk, if it has one."))),
        ("cpu", text("CPU profile.")),
        ("created_unix_ms", number("When it was created.")),
        ("started_unix_ms", nullable(number("When its guest was last booted; a move does not change it."))),
        ("uptime_ms", nullable(number("Since then, while it runs."))),
        ("migration", nullable(schema("MigrationRef"))),
    ];
    let reference = [
        ("id", text("Id of the migration.")),
        ("target", text("Where the machine goes.")),
        ("phase", schema("Phase")),
        ("progress", nullable(schema("Progress"))),
    ];
    let reason = [("code", text("For programs.")), ("detail", text("For people."))];
    let list = [
        ("machines", json!({"type": "array", "items": schema("Machine")})),
        ("next_cursor", text("`cursor` of the next page; absent on the last.")),
    ];
    vec![
        ("MachineState", json!({"type": "string", "enum": states})),
        ("Machine", open(&machine)),
        ("MigrationRef", open(&reference)),
        ("Reason", open(&reason)),
        ("MachineList", open(&list)),
        ("Destroyed", open(&[("state", json!({"const": "destroyed"}))])),
    ]
}

fn migrations() -> Vec<Schema> {
    let phases: Vec<_> = Phase::ALL.iter().map(|phase| phase.as_str()).collect();
    let stages = ["connecting", "precopy", "reconnecting", "switchover", "committing", "completing"];
    let migration = [
        ("id", text("Id.")),
        ("machine", text("Id of the machine.")),
        ("machine_name", text("Name of the machine.")),
        ("source", text("Where it comes from.")),
        ("target", text("Where it goes.")),
        ("epoch", number("Epoch under which the target owns the machine, if it succeeds.")),
        ("phase", schema("Phase")),
        ("message", nullable(text("What it waits for."))),
        ("cancel_requested", json!({"type": "boolean"})),
        ("downtime_budget_us", number("Longest pause aimed for.")),
        ("progress", nullable(schema("Progress"))),
        ("timings", nullable(schema("Timings"))),
        ("error", nullable(schema("Reason"))),
        ("requested_unix_ms", number("When it was asked for.")),
        ("started_unix_ms", nullable(number("When its turn came."))),
        ("ended_unix_ms", nullable(number("When it ended."))),
    ];
    let progress = [
        ("stage", json!({"type": "string", "enum": stages})),
        ("round", number("Round of the pre-copy, from 1.")),
        ("ram_bytes", number("RAM of the machine.")),
        ("sent_bytes", number("Sent over all rounds.")),
        ("remaining_bytes", number("Left in this round.")),
        ("dirty_pages_per_s", number("Dirtied by the guest in the last round.")),
        ("bytes_per_s", number("Goodput over the last round.")),
        ("predicted_downtime_us", number("Pause if it began now; 0 while unknown.")),
        ("eta_ms", number("Until the switch-over; 0 while unknown.")),
        ("elapsed_ms", number("Since the source began.")),
    ];
    let list = [
        ("migrations", json!({"type": "array", "items": schema("Migration")})),
        ("next_cursor", text("`cursor` of the next page; absent on the last.")),
    ];
    vec![
        ("Phase", json!({"type": "string", "enum": phases})),
        ("Migration", open(&migration)),
        ("Progress", open(&progress)),
        ("Timings", open(&timings())),
        ("MigrationList", open(&list)),
    ]
}

fn timings() -> [(&'static str, Value); 14] {
    [
        ("total_ms", number("From the command to the target running.")),
        ("rounds", number("Rounds, the final one included.")),
        ("sent_bytes", number("Bytes sent, headers included.")),
        ("pages_sent", number("Pages sent with their content.")),
        ("pages_zero", number("Pages sent as a reference to zero.")),
        ("pause_us", number("The whole pause.")),
        ("stop_us", number("Of it: stopping vCPUs and devices.")),
        ("harvest_us", number("Of it: the last dirty log.")),
        ("final_copy_us", number("Of it: the last dirty pages.")),
        ("save_us", number("Of it: saving state, beside the final copy.")),
        ("restore_us", number("Of it: loading state on the target.")),
        ("resume_us", number("Of it: from Commit to vCPUs running.")),
        ("final_pages", number("Pages of the final copy.")),
        ("packets_held", number("Packets held and forwarded.")),
    ]
}

fn others() -> Vec<Schema> {
    let host = [
        ("name", text("Name, as in its certificate.")),
        ("state", json!({"type": "string", "enum": ["online", "connecting", "lost"]})),
        ("release", text("Release of its daemon.")),
        ("ram_bytes", nullable(number("RAM that machines may use in all."))),
        ("ram_free_bytes", nullable(number("RAM that nothing has or reserves."))),
        ("cpus", nullable(number("Physical CPUs."))),
        ("vcpus_used", number("vCPUs of the machines placed here.")),
        ("machines", number("Machines placed here.")),
        ("tsc_khz", nullable(number("TSC frequency."))),
        ("cpu_features", json!({"type": "array", "items": {"type": "string"}})),
        ("last_heard_ms_ago", nullable(number("Since it was last heard of."))),
    ];
    let problem = [
        ("code", text("For programs: snake case, stable.")),
        ("status", number("HTTP status.")),
        ("title", text("The same for each problem of this code.")),
        ("detail", text("This case.")),
        ("remedy", text("What to do about it.")),
        ("conflicting_id", text("What stands in the way, if something with an id does.")),
    ];
    vec![
        ("Host", open(&host)),
        ("HostList", open(&[("hosts", json!({"type": "array", "items": schema("Host")}))])),
        ("Problem", open(&problem)),
    ]
}

fn text(description: &str) -> Value {
    json!({"type": "string", "description": description})
}

fn number(description: &str) -> Value {
    json!({"type": "integer", "minimum": 0, "description": description})
}

fn nullable(value: Value) -> Value {
    json!({"oneOf": [value, {"type": "null"}]})
}

/// An object that may gain fields.
fn open(fields: &[(&str, Value)]) -> Value {
    let properties: Map<String, Value> =
        fields.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect();
    json!({"type": "object", "properties": properties})
}

/// An object that takes no other fields.
fn closed(fields: &[(&str, Value)], required: &[&str]) -> Value {
    let mut object = open(fields);
    object["additionalProperties"] = false.into();
    object["required"] = json!(required);
    object
}
