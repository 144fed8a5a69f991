//! The policy of the switch-over.

use proptest::prelude::*;
use wire::migration::convergence::{Convergence, Decision, Policy};
use wire::units::PAGE_BYTES;

const GIB: u64 = 1 << 30;

fn policy() -> Policy {
    Policy { downtime_budget_us: 10_000, fixed_us: 1_500, rounds_max: 30, stall_rounds: 3, hard_cap_us: None }
}

/// Plays rounds against a guest that dirties `dirty_per_s` pages of a working set of `hot` pages, over a link of
/// `bytes_per_s`. Returns the number of rounds, the last prediction, and whether it stalled on the way.
fn play(
    policy: Policy,
    ram_pages: u64,
    hot: u64,
    dirty_per_s: u64,
    bytes_per_s: u64,
    most: u32,
) -> (u32, u64, bool) {
    let mut convergence = Convergence::new(policy);
    let (mut pages, mut stalled) = (ram_pages, false);
    for round in 1..=most {
        let us = (pages * PAGE_BYTES * 1_000_000 / bytes_per_s).max(1);
        convergence.round_sent(pages * PAGE_BYTES, us);
        pages = (dirty_per_s * us / 1_000_000).min(hot);
        match convergence.decide(round, pages) {
            Decision::Switchover => return (round, convergence.forecast().downtime_us, stalled),
            Decision::Stalled => stalled = true,
            Decision::NextRound => {}
        }
    }
    (most + 1, convergence.forecast().downtime_us, stalled)
}

#[test]
fn an_idle_guest_moves_after_one_round() {
    assert_eq!(play(policy(), GIB / PAGE_BYTES, 0, 0, GIB, 100), (1, 1_500, false));
}

#[test]
fn a_busy_guest_on_a_faster_link_converges_within_the_budget() {
    // 20,000 pages a second are 82 MB/s, a twelfth of the link.
    let (rounds, predicted, _) = play(policy(), GIB / PAGE_BYTES, GIB / PAGE_BYTES, 20_000, GIB, 100);
    assert!((2..=4).contains(&rounds), "{rounds}");
    assert!(predicted <= 10_000, "{predicted}");
}

#[test]
fn a_guest_that_outruns_the_link_is_moved_all_the_same() {
    let (rounds, predicted, stalled) = play(policy(), GIB / PAGE_BYTES, 100_000, 500_000, GIB, 100);
    assert!(rounds <= 8, "{rounds}");
    assert!(predicted > 10_000 && !stalled);
}

#[test]
fn the_hard_cap_keeps_a_hopeless_guest_where_it_is() {
    let policy = Policy { hard_cap_us: Some(50_000), ..policy() };
    let (rounds, predicted, stalled) = play(policy, GIB / PAGE_BYTES, 100_000, 500_000, GIB, 100);
    assert_eq!(rounds, 101);
    assert!(predicted > 50_000 && stalled);
    // With a hot set below the cap it goes after all.
    let (rounds, predicted, _) = play(policy, GIB / PAGE_BYTES, 10_000, 500_000, GIB, 100);
    assert!(rounds < 10 && predicted <= 50_000, "{rounds} {predicted}");
}

#[test]
fn a_bad_moment_is_waited_out() {
    let mut convergence = Convergence::new(policy());
    convergence.round_sent(GIB, 1_000_000);
    // The best prediction is that of round 2; from then on it gets no better.
    let pages = [20_000, 10_000, 12_000, 11_800, 30_000, 12_100];
    let decisions: Vec<_> = (1..).zip(pages).map(|(round, pages)| convergence.decide(round, pages)).collect();
    assert_eq!(decisions[..5], [Decision::NextRound; 5], "{decisions:?}");
    assert_eq!(decisions[5], Decision::Switchover);
}

#[test]
fn asking_twice_for_a_round_counts_it_once() {
    let policy = Policy { rounds_max: 3, ..policy() };
    let mut convergence = Convergence::new(policy);
    convergence.round_sent(GIB, 1_000_000);
    for _ in 0..10 {
        assert_eq!(convergence.decide(1, 100_000), Decision::NextRound);
    }
}

#[test]
fn small_rounds_do_not_make_the_link_look_fast() {
    let mut convergence = Convergence::new(policy());
    convergence.round_sent(GIB, 1_000_000);
    // Eighty pages vanish in the transport's buffer within ten microseconds.
    convergence.round_sent(80 * PAGE_BYTES, 10);
    convergence.decide(2, 50_000);
    let speed = convergence.forecast().bytes_per_s;
    assert!((GIB / 2..=GIB * 2).contains(&speed), "{speed}");
}

#[test]
fn the_forecast_tells_rates_and_time() {
    let mut convergence = Convergence::new(policy());
    convergence.round_sent(GIB, 1_000_000);
    convergence.decide(1, 50_000);
    let forecast = convergence.forecast();
    assert_eq!(forecast.dirty_pages_per_s, 50_000);
    assert_eq!(forecast.bytes_per_s, GIB);
    // 200 MB to copy, while a fifth of the link's speed is dirtied anew.
    assert!((200_000..300_000).contains(&forecast.eta_us), "{forecast:?}");
}

#[test]
fn a_pause_within_the_budget_is_shortened_while_each_round_takes_much_off() {
    let mut convergence = Convergence::new(policy());
    convergence.round_sent(GIB, 1_000_000);
    // 4 ms of copying: within the 10 ms, but a round more may save most of it.
    assert_eq!(convergence.decide(1, 1_000), Decision::NextRound);
    assert_eq!(convergence.decide(2, 100), Decision::Switchover);

    let mut stuck = Convergence::new(policy());
    stuck.round_sent(GIB, 1_000_000);
    assert_eq!(stuck.decide(1, 1_000), Decision::NextRound);
    assert_eq!(stuck.decide(2, 1_000), Decision::Switchover);
}

proptest! {
    #[test]
    fn without_a_hard_cap_it_always_ends(
        ram in 4_096_u64..1 << 22,
        hot in 0_u64..1 << 22,
        dirty_per_s in 0_u64..10_000_000,
        bytes_per_s in 1_000_000_u64..20_000_000_000,
        rounds_max in 1_u32..60,
        stall_rounds in 1_u32..10,
        budget in 0_u64..1_000_000,
    ) {
        let policy = Policy { downtime_budget_us: budget, rounds_max, stall_rounds, ..policy() };
        let (rounds, _, stalled) = play(policy, ram, hot.min(ram), dirty_per_s, bytes_per_s, 200);
        prop_assert!(rounds <= rounds_max, "{} rounds", rounds);
        prop_assert!(!stalled);
    }

    #[test]
    fn no_numbers_make_it_panic(
        steps in prop::collection::vec((any::<u64>(), any::<u64>(), any::<u32>(), any::<u64>()), 0..30),
        cap in any::<Option<u64>>(), fixed in any::<u64>(), stall in any::<u32>(), most in any::<u32>(),
    ) {
        let mut convergence = Convergence::new(Policy {
            downtime_budget_us: 10_000, fixed_us: fixed, rounds_max: most, stall_rounds: stall, hard_cap_us: cap,
        });
        for (bytes, us, round, pages) in steps {
            convergence.round_sent(bytes, us);
            let decision = convergence.decide(round, pages);
            let predicted = convergence.forecast().downtime_us;
            if decision == Decision::Switchover {
                prop_assert!(predicted <= 10_000 || cap.is_none_or(|cap| predicted <= cap));
            }
        }
    }

    #[test]
    fn more_dirty_pages_never_predict_a_shorter_pause(a in 0_u64..1 << 28, b in 0_u64..1 << 28, us in 1_u64..10_000_000) {
        let predict = |pages| {
            let mut convergence = Convergence::new(policy());
            convergence.round_sent(GIB, us);
            convergence.decide(1, pages);
            convergence.forecast().downtime_us
        };
        prop_assert!(predict(a.min(b)) <= predict(a.max(b)));
    }
}
