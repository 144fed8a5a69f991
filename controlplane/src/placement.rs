//! Where a machine goes: a pure function over a model of the fleet.
//!
//! Of the hosts that can take the machine the one with most free RAM is taken (spreading load and the loss that a
//! dead host means), then the one with most free vCPUs, then the first by name: the same fleet gives the same answer. When none
//! can take it, the error says of each host why not.

use std::collections::BTreeSet;
use std::fmt;

use wire::ids::HostName;

/// A host as placement sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostModel {
    /// Its name.
    pub name: HostName,
    /// Whether it is connected and has told its capacity.
    pub usable: bool,
    /// RAM that neither a machine nor a reservation has, in bytes.
    pub ram_free_bytes: u64,
    /// RAM that machines may use in all, in bytes.
    pub ram_bytes: u64,
    /// vCPUs it may still take, overcommitment counted in.
    pub vcpus_free: u32,
    /// vCPUs it may take in all.
    pub vcpus: u32,
    /// CPU features.
    pub features: BTreeSet<String>,
}

/// What a machine needs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Demand {
    /// RAM in bytes.
    pub ram_bytes: u64,
    /// vCPUs.
    pub vcpus: u32,
    /// CPU features that its guest may be using.
    pub features: Vec<String>,
    /// Only this host will do.
    pub only: Option<HostName>,
    /// Any host but this.
    pub not: Option<HostName>,
}

/// Why a host cannot take a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// Not connected.
    NotInSight,
    /// It is where the machine comes from.
    Source,
    /// Not enough RAM, in bytes.
    Ram {
        /// Asked for.
        want: u64,
        /// Free.
        free: u64,
        /// In all.
        total: u64,
    },
    /// Not enough vCPUs.
    Vcpus {
        /// Asked for.
        want: u32,
        /// Free.
        free: u32,
    },
    /// A CPU feature is missing.
    Feature(String),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotInSight => f.write_str("not in sight"),
            Self::Source => f.write_str("the machine is there already"),
            Self::Ram { want, free, total } => {
                write!(f, "{} MiB RAM asked for, {} MiB free of {} MiB", want >> 20, free >> 20, total >> 20)
            }
            Self::Vcpus { want, free } => write!(f, "{want} vCPUs asked for, {free} free"),
            Self::Feature(name) => write!(f, "its CPU lacks `{name}`"),
        }
    }
}

/// No host can take the machine.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct Unplaceable {
    /// Each host considered, with its reason, by name.
    pub refusals: Vec<(HostName, Refusal)>,
}

impl fmt::Display for Unplaceable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.refusals.is_empty() {
            return f.write_str("the fleet has no hosts");
        }
        for (at, (name, refusal)) in self.refusals.iter().enumerate() {
            let separator = if at == 0 { "" } else { "; " };
            write!(f, "{separator}{name}: {refusal}")?;
        }
        Ok(())
    }
}

/// Chooses a host.
///
/// # Errors
/// [`Unplaceable`] when no host can take it.
pub fn place(hosts: &[HostModel], demand: &Demand) -> Result<HostName, Unplaceable> {
    let mut refusals = Vec::new();
    let mut best: Option<&HostModel> = None;
    for host in hosts {
        if demand.only.as_ref().is_some_and(|only| *only != host.name) {
            continue;
        }
        if let Some(refusal) = refusal(host, demand) {
            refusals.push((host.name.clone(), refusal));
        } else if best.is_none_or(|best| preference(host) > preference(best)) {
            best = Some(host);
        }
    }
    refusals.sort_by(|a, b| a.0.cmp(&b.0));
    best.map(|host| host.name.clone()).ok_or(Unplaceable { refusals })
}

fn preference(host: &HostModel) -> (u64, u32, std::cmp::Reverse<&HostName>) {
    (host.ram_free_bytes, host.vcpus_free, std::cmp::Reverse(&host.name))
}

fn refusal(host: &HostModel, demand: &Demand) -> Option<Refusal> {
    if demand.not.as_ref() == Some(&host.name) {
        return Some(Refusal::Source);
    }
    if !host.usable {
        return Some(Refusal::NotInSight);
    }
    if let Some(missing) = demand.features.iter().find(|feature| !host.features.contains(*feature)) {
        return Some(Refusal::Feature(missing.clone()));
    }
    if host.ram_free_bytes < demand.ram_bytes {
        return Some(Refusal::Ram {
            want: demand.ram_bytes,
            free: host.ram_free_bytes,
            total: host.ram_bytes,
        });
    }
    (host.vcpus_free < demand.vcpus).then_some(Refusal::Vcpus { want: demand.vcpus, free: host.vcpus_free })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn host(name: &str, ram: u64, vcpus: u32) -> HostModel {
        HostModel {
            name: name.parse().unwrap(),
            usable: true,
            ram_free_bytes: ram,
            ram_bytes: ram,
            vcpus_free: vcpus,
            vcpus,
            features: ["sse4_2".to_owned()].into(),
        }
    }

    #[test]
    fn most_free_ram_wins_and_ties_go_to_the_first_name() {
        let demand = Demand { ram_bytes: 1, vcpus: 1, ..Demand::default() };
        let fleet = [host("b", 10, 2), host("c", 20, 2), host("a", 20, 2)];
        assert_eq!(place(&fleet, &demand).unwrap().as_str(), "a");
        let not_a = Demand { not: Some("a".parse().unwrap()), ..demand };
        assert_eq!(place(&fleet, &not_a).unwrap().as_str(), "c");
    }

    #[test]
    fn each_host_says_why_not() {
        let mut gone = host("d", 100, 9);
        gone.usable = false;
        let fleet = [host("a", 10 << 20, 2), host("b", 100 << 20, 0), gone, host("e", 100 << 20, 9)];
        let demand =
            Demand { ram_bytes: 20 << 20, vcpus: 1, not: Some("e".parse().unwrap()), ..Demand::default() };
        let error = place(&fleet, &demand).unwrap_err().to_string();
        assert_eq!(
            error,
            "a: 20 MiB RAM asked for, 10 MiB free of 10 MiB; b: 1 vCPUs asked for, 0 free; \
             d: not in sight; e: the machine is there already"
        );
        let feature = Demand { features: vec!["avx512f".to_owned()], ..Demand::default() };
        assert!(place(&fleet[..1], &feature).unwrap_err().to_string().contains("lacks `avx512f`"));
        assert_eq!(place(&[], &demand).unwrap_err().to_string(), "the fleet has no hosts");
    }

    proptest! {
        /// Whatever the order hosts are listed in, the same one is chosen, and it can take the machine.
        #[test]
        fn the_choice_fits_and_does_not_depend_on_order(
            sizes in proptest::collection::vec((0_u64..8, 0_u32..4, any::<bool>()), 0..8),
            ram in 0_u64..8,
            vcpus in 0_u32..4,
        ) {
            let fleet: Vec<_> = sizes.iter().enumerate().map(|(at, &(ram, vcpus, usable))| HostModel {
                usable, ..host(&format!("h{at}"), ram, vcpus)
            }).collect();
            let demand = Demand { ram_bytes: ram, vcpus, ..Demand::default() };
            let reversed: Vec<_> = fleet.iter().rev().cloned().collect();
            let choice = place(&fleet, &demand);
            prop_assert_eq!(&choice, &place(&reversed, &demand));
            match choice {
                Ok(name) => {
                    let chosen = fleet.iter().find(|h| h.name == name).unwrap();
                    prop_assert!(refusal(chosen, &demand).is_none());
                }
                Err(error) => {
                    prop_assert_eq!(error.refusals.len(), fleet.len());
                    prop_assert!(fleet.iter().all(|h| refusal(h, &demand).is_some()));
                }
            }
        }
    }
}
