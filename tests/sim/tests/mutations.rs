//! Proof that the simulator can fail: each rule that is broken on purpose must be found, and by the check that is meant
//! for it.

use sim::{Mutation, Options, run};

/// Seeds within which a broken rule must be found.
const SEEDS: u64 = 20_000;

/// The first seed at which `mutation` shows, and how.
fn found(mutation: Mutation) -> Option<(u64, String)> {
    let options = Options { mutation: Some(mutation), ..Options::default() };
    (1..=SEEDS).find_map(|seed| run(seed, &options).violations.into_iter().next().map(|what| (seed, what)))
}

fn expect(mutation: Mutation, words: &[&str]) {
    let (seed, what) =
        found(mutation).unwrap_or_else(|| panic!("{mutation:?} was not found in {SEEDS} seeds"));
    println!("{mutation:?}: seed {seed}: {what}");
    assert!(words.iter().any(|word| what.contains(word)), "{mutation:?}, seed {seed}: {what}");
}

#[test]
fn two_running_copies_are_found() {
    for mutation in [
        Mutation::ResumeInDoubt,
        Mutation::RestartResumesDisowned,
        Mutation::CommitBeforeDisown,
        Mutation::FenceWithoutDrop,
        Mutation::ReclaimWithoutFence,
    ] {
        // A copy that comes back after the other has run shows as old content.
        expect(mutation, &["invariant 1", "invariant 2"]);
    }
}

#[test]
fn lost_pages_are_found() {
    for mutation in [
        Mutation::RoundEndBeforePages,
        Mutation::DirtyBitsNotGivenBack,
        Mutation::ReadBeforeTake,
        Mutation::LanesNotHalted,
        Mutation::StaleState,
        Mutation::NoPause,
    ] {
        expect(mutation, &["invariant 2"]);
    }
}

#[test]
fn a_lost_guest_is_found() {
    expect(Mutation::RestartDropsRunning, &["invariant 2", "no copy runs"]);
}
