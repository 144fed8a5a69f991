//! A short campaign in the ordinary test run; the long one is `cargo xtask sim`.

use sim::{Options, campaign, run};

#[test]
fn many_seeds_hold_the_invariants() {
    let summary = campaign(1_000_000, 3_000, 2, &Options::default());
    assert_eq!(summary.violations, []);
    assert_eq!(summary.seeds, 3_000);
    let reached = summary.reached;
    let counts = [
        reached.resumed,
        reached.rolled_back,
        reached.reclaimed,
        reached.settled,
        reached.dropped,
        reached.cancelled,
    ];
    assert!(counts.iter().all(|&count| count >= 10), "{reached:?}");
    assert!(summary.moved > 2_500, "only {} of {} moved", summary.moved, summary.seeds);
}

#[test]
fn in_fair_weather_every_machine_moves() {
    let summary = campaign(1, 500, 2, &Options::calm());
    assert_eq!(summary.violations, []);
    assert_eq!(summary.moved, 500);
}

#[test]
fn a_seed_repeats_itself() {
    let options = Options { trace: true, ..Options::default() };
    for seed in [3, 77, 4_711] {
        let first = run(seed, &options);
        assert!(first.trace.len() > 50);
        assert_eq!(first, run(seed, &options));
    }
}
