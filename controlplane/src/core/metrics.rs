//! Figures for a monitoring system, in the Prometheus text format.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use super::Core;
use crate::api::{HostState, MachineState, Phase};

impl Core {
    /// The figures as of now.
    pub fn metrics(&self) -> String {
        let mut machines: BTreeMap<&str, u64> =
            MachineState::ALL.into_iter().map(|state| (state.as_str(), 0)).collect();
        for record in self.model.machines() {
            *machines.entry(self.machine_state(record).as_str()).or_default() += 1;
        }
        let mut hosts: BTreeMap<&str, u64> = [HostState::Online, HostState::Connecting, HostState::Lost]
            .into_iter()
            .map(|state| (state.as_str(), 0))
            .collect();
        for host in self.hosts.values() {
            *hosts.entry(host.state().as_str()).or_default() += 1;
        }
        let mut migrations: BTreeMap<&str, u64> =
            Phase::ALL.into_iter().map(|phase| (phase.as_str(), 0)).collect();
        for record in self.model.migrations() {
            *migrations.entry(super::views::phase(&record.state).as_str()).or_default() += 1;
        }
        let mut text = String::new();
        gauge(&mut text, "mashines_machines", "Machines by state.", "state", &machines);
        gauge(&mut text, "mashines_hosts", "Hosts by state.", "state", &hosts);
        gauge(&mut text, "mashines_migrations", "Migrations on record by phase.", "phase", &migrations);
        let events = self.model.meta().event_id;
        // Writing into a String cannot fail.
        let _ = writeln!(
            text,
            "# HELP mashines_events_total Events so far.\n# TYPE mashines_events_total counter\nmashines_events_total {events}"
        );
        text
    }
}

fn gauge(text: &mut String, name: &str, help: &str, label: &str, values: &BTreeMap<&str, u64>) {
    let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} gauge");
    for (value, count) in values {
        let _ = writeln!(text, "{name}{{{label}=\"{value}\"}} {count}");
    }
}
