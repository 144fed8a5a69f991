//! Page sets against a model: a `BTreeSet` of page numbers.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::BTreeSet;

use proptest::prelude::*;
use wire::pages::{Lane, PageRun, PageSet, chunks_of, lane_of, runs_in, split_at_chunks, words_of};
use wire::units::{CHUNK_PAGES, PageIndex};

const BOUND: u64 = 300;

#[derive(Debug, Clone)]
enum Op {
    Insert(u64),
    Remove(u64),
    InsertRun(u64, u64),
    RemoveRun(u64, u64),
    InsertWord(usize, u64),
    Clear,
}

fn op() -> impl Strategy<Value = Op> {
    let page = 0..BOUND + 40;
    prop_oneof![
        4 => page.clone().prop_map(Op::Insert),
        4 => page.clone().prop_map(Op::Remove),
        3 => (page.clone(), 0_u64..200).prop_map(|(first, count)| Op::InsertRun(first, count)),
        3 => (page, 0_u64..200).prop_map(|(first, count)| Op::RemoveRun(first, count)),
        2 => (0_usize..7, any::<u64>()).prop_map(|(word, bits)| Op::InsertWord(word, bits)),
        1 => Just(Op::Clear),
    ]
}

fn run(first: u64, count: u64) -> PageRun {
    PageRun { first: PageIndex(first), count }
}

fn apply(op: &Op, set: &mut PageSet, model: &mut BTreeSet<u64>) {
    match *op {
        Op::Insert(page) => {
            let new = page < BOUND && model.insert(page);
            assert_eq!(set.insert(PageIndex(page)), new);
        }
        Op::Remove(page) => assert_eq!(set.remove(PageIndex(page)), model.remove(&page)),
        Op::InsertRun(first, count) => {
            set.insert_run(run(first, count));
            model.extend((first..first + count).filter(|&page| page < BOUND));
        }
        Op::RemoveRun(first, count) => {
            set.remove_run(run(first, count));
            model.retain(|page| !(first..first + count).contains(page));
        }
        Op::InsertWord(word, bits) => {
            set.insert_word(word, bits);
            let base = word as u64 * 64;
            model.extend(
                (0..64).filter(|bit| bits >> bit & 1 == 1).map(|bit| base + bit).filter(|&p| p < BOUND),
            );
        }
        Op::Clear => {
            set.clear();
            model.clear();
        }
    }
}

fn pages(set: &PageSet) -> BTreeSet<u64> {
    set.runs().flat_map(|run| run.pages().map(|page| page.0)).collect()
}

proptest! {
    #[test]
    fn a_page_set_is_a_set(ops in prop::collection::vec(op(), 0..60)) {
        let (mut set, mut model) = (PageSet::empty(BOUND), BTreeSet::new());
        for op in &ops {
            apply(op, &mut set, &mut model);
            prop_assert_eq!(set.count(), model.len() as u64);
            prop_assert_eq!(set.is_empty(), model.is_empty());
        }
        prop_assert_eq!(&pages(&set), &model);
        for page in 0..BOUND + 70 {
            prop_assert_eq!(set.contains(PageIndex(page)), model.contains(&page));
        }
        // Runs are in order, not empty, and as long as they can be.
        let runs: Vec<_> = set.runs().collect();
        prop_assert!(runs.iter().all(|run| run.count > 0));
        prop_assert!(runs.windows(2).all(|pair| pair[0].end() < pair[1].first));
    }

    #[test]
    fn union_and_difference(a in prop::collection::btree_set(0..BOUND, 0..80), b in prop::collection::btree_set(0..BOUND, 0..80)) {
        let make = |pages: &BTreeSet<u64>| {
            let mut set = PageSet::empty(BOUND);
            pages.iter().for_each(|&page| { set.insert(PageIndex(page)); });
            set
        };
        let mut union = make(&a);
        union.union_with(&make(&b));
        prop_assert_eq!(pages(&union), a.union(&b).copied().collect::<BTreeSet<_>>());
        let mut difference = make(&a);
        difference.difference_with(&make(&b));
        prop_assert_eq!(pages(&difference), a.difference(&b).copied().collect::<BTreeSet<_>>());
    }

    #[test]
    fn runs_of_shared_words_begin_where_told(words in prop::collection::vec(any::<u64>(), 0..6), first in 0_u64..1 << 28) {
        let found: Vec<u64> = runs_in(&words, PageIndex(first)).flat_map(PageRun::pages).map(|p| p.0).collect();
        let wanted: Vec<u64> = (0..words.len() as u64 * 64)
            .filter(|bit| words[usize::try_from(bit / 64).unwrap()] >> (bit % 64) & 1 == 1)
            .map(|bit| first + bit)
            .collect();
        prop_assert_eq!(found, wanted);
    }

    #[test]
    fn words_cover_a_run(first in 0_u64..400, count in 0_u64..400) {
        let covered: u64 = words_of(run(first, count), BOUND).map(|(_, mask)| u64::from(mask.count_ones())).sum();
        let end = (first + count).min(BOUND);
        prop_assert_eq!(covered, end.saturating_sub(first));
    }

    #[test]
    fn parts_of_a_run_stay_within_their_chunks(first in 0_u64..4 * CHUNK_PAGES, count in 0_u64..3 * CHUNK_PAGES) {
        let parts: Vec<_> = split_at_chunks(run(first, count)).collect();
        prop_assert_eq!(parts.iter().map(|part| part.count).sum::<u64>(), count);
        prop_assert!(parts.iter().all(|part| part.first.chunk() == PageIndex(part.end().0 - 1).chunk()));
        prop_assert!(parts.windows(2).all(|pair| pair[0].end() == pair[1].first));
    }

    #[test]
    fn each_chunk_has_one_lane(lanes in 1_u16..40, chunks in 0_u64..200) {
        let mut seen = BTreeSet::new();
        for lane in (0..lanes).map(Lane) {
            for chunk in chunks_of(lane, lanes, chunks) {
                prop_assert_eq!(lane_of(chunk, lanes), lane);
                prop_assert!(seen.insert(chunk));
            }
        }
        prop_assert_eq!(seen.len() as u64, chunks);
    }
}

#[test]
fn a_full_set_ends_at_its_bound() {
    for bound in [0, 1, 63, 64, 65, 4096] {
        let set = PageSet::full(bound);
        assert_eq!((set.count(), set.bound()), (bound, bound));
        assert!(!set.contains(PageIndex(bound)));
        assert!(!set.contains(PageIndex(u64::MAX)));
    }
}

#[test]
fn the_largest_ram_has_a_set() {
    let mut set = PageSet::empty(1 << 28);
    assert!(set.insert(PageIndex((1 << 28) - 1)));
    assert_eq!(set.runs().next(), Some(run((1 << 28) - 1, 1)));
}
