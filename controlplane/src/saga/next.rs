//! The transition function of the saga.

use super::{End, Event, State};

/// An event that has no meaning in a state: late, doubled, or from a host that breaks the protocol. The saga stays as it is.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("event {event:?} means nothing in state {state:?}")]
pub struct Illegal {
    /// The state.
    pub state: Box<State>,
    /// The event.
    pub event: Box<Event>,
}

impl Illegal {
    fn new(state: &State, event: Event) -> Self {
        Self { state: Box::new(state.clone()), event: Box::new(event) }
    }
}

/// The state that follows `state` when `event` is learnt.
///
/// # Errors
/// [`Illegal`] when nothing follows; the caller keeps the state.
pub fn next(state: &State, event: Event) -> Result<State, Illegal> {
    let ended = |end| Ok(State::Ended { end });
    match (state, event) {
        (State::Pending, Event::Start) => Ok(State::Preparing),
        (State::Pending | State::Preparing, Event::CancelBeforeMove) => ended(End::Cancelled),
        (State::Pending | State::Preparing, Event::PrepareFailed { code, detail }) => {
            ended(End::failed(code, detail))
        }
        (State::Preparing, Event::Prepared(route)) => Ok(State::Moving { route, begun: false }),
        (State::Pending | State::Preparing | State::Moving { .. }, Event::MachineGone) => ended(lost()),
        (State::Moving { route, .. }, event) => moving(state, route, event),
        (State::InDoubt { .. }, event) => in_doubt(state, event),
        (State::Fencing, event) => fencing(state, event),
        (State::Reclaiming { .. }, Event::Reclaimed) => ended(End::failed(
            "peer_lost",
            "it was not certain whether the target had it; the target was fenced and the source took it back",
        )),
        (State::Reclaiming { .. }, Event::MachineGone) => ended(lost()),
        // The source has seen a higher epoch than the one it was told: again, under one above that.
        (State::Reclaiming { epoch }, Event::Fenced { reclaim }) if reclaim > *epoch => {
            Ok(State::Reclaiming { epoch: reclaim })
        }
        // The control plane learnt from the target that it had succeeded; the figures come from the source.
        (
            State::Ended { end: End::Succeeded { timings: None } },
            Event::SourceEnded(end @ End::Succeeded { timings: Some(_) }),
        ) => ended(end),
        (_, event) => Err(Illegal::new(state, event)),
    }
}

fn lost() -> End {
    End::Failed {
        code: "machine_lost".to_owned(),
        detail: "the source lost the machine during the migration".to_owned(),
        machine_lost: true,
    }
}

fn moving(state: &State, route: &super::Route, event: Event) -> Result<State, Illegal> {
    let ended = |end| Ok(State::Ended { end });
    match event {
        Event::Begun | Event::SourceMoving => Ok(State::Moving { route: route.clone(), begun: true }),
        Event::MoveRefused { code, detail } => ended(End::failed(code, detail)),
        Event::CancelDone => ended(End::Cancelled),
        Event::SourceEnded(end) => ended(end),
        Event::TargetOwns => ended(End::Succeeded { timings: None }),
        Event::SourceUnsure { said_so } => {
            Ok(State::InDoubt { route: route.clone(), source_unsure: said_so, target_not_owner: false })
        }
        event => Err(Illegal::new(state, event)),
    }
}

fn in_doubt(state: &State, event: Event) -> Result<State, Illegal> {
    let State::InDoubt { route, source_unsure, target_not_owner } = state else {
        return Err(Illegal::new(state, event));
    };
    let weigh = |source_unsure: bool, target_not_owner: bool| {
        if source_unsure && target_not_owner {
            State::Fencing
        } else {
            State::InDoubt { route: route.clone(), source_unsure, target_not_owner }
        }
    };
    match event {
        Event::SourceMoving => Ok(State::Moving { route: route.clone(), begun: true }),
        Event::SourceEnded(end) => Ok(State::Ended { end }),
        Event::CancelDone => Ok(State::Ended { end: End::Cancelled }),
        Event::TargetOwns => Ok(State::Ended { end: End::Succeeded { timings: None } }),
        Event::SourceUnsure { said_so } => Ok(weigh(*source_unsure || said_so, *target_not_owner)),
        Event::TargetNotOwner => Ok(weigh(*source_unsure, true)),
        event => Err(Illegal::new(state, event)),
    }
}

/// While the fence is on its way the source may still hear from the target by itself, and then says how it ended.
fn fencing(state: &State, event: Event) -> Result<State, Illegal> {
    match event {
        Event::TargetOwns => Ok(State::Ended { end: End::Succeeded { timings: None } }),
        Event::SourceEnded(end @ End::Succeeded { .. }) => Ok(State::Ended { end }),
        Event::Fenced { reclaim } => Ok(State::Reclaiming { epoch: reclaim }),
        event => Err(Illegal::new(state, event)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::Timings;
    use crate::saga::Route;
    use proptest::prelude::*;
    use std::net::{Ipv4Addr, Ipv6Addr};
    use wire::ids::Epoch;

    fn route() -> Route {
        Route {
            addresses: vec!["198.18.0.2:7000".to_owned()],
            forward_ip4: Ipv4Addr::LOCALHOST,
            forward_ip6: Ipv6Addr::LOCALHOST,
        }
    }

    fn run(events: Vec<Event>) -> State {
        events.into_iter().fold(State::Pending, |state, event| next(&state, event).unwrap())
    }

    #[test]
    fn the_straight_way() {
        let end = End::Succeeded { timings: Some(Timings::default()) };
        let state =
            run(vec![Event::Start, Event::Prepared(route()), Event::Begun, Event::SourceEnded(end.clone())]);
        assert_eq!(state, State::Ended { end });
    }

    #[test]
    fn doubt_is_fenced_before_it_is_reclaimed() {
        let doubt = vec![
            Event::Start,
            Event::Prepared(route()),
            Event::Begun,
            Event::SourceUnsure { said_so: true },
            Event::TargetNotOwner,
        ];
        assert_eq!(run(doubt.clone()), State::Fencing);
        let fenced = doubt.iter().cloned().chain([Event::Fenced { reclaim: Epoch(3) }]).collect();
        assert_eq!(run(fenced), State::Reclaiming { epoch: Epoch(3) });
        let late = doubt.into_iter().chain([Event::TargetOwns]).collect();
        assert_eq!(run(late), State::Ended { end: End::Succeeded { timings: None } });
    }

    fn event() -> impl Strategy<Value = Event> {
        let text = || ("[a-z]{1,4}", "[a-z]{1,4}");
        prop_oneof![
            Just(Event::Start),
            Just(Event::CancelBeforeMove),
            Just(Event::Prepared(route())),
            text().prop_map(|(code, detail)| Event::PrepareFailed { code, detail }),
            Just(Event::Begun),
            text().prop_map(|(code, detail)| Event::MoveRefused { code, detail }),
            Just(Event::CancelDone),
            any::<bool>().prop_map(|said_so| Event::SourceUnsure { said_so }),
            Just(Event::SourceMoving),
            Just(Event::SourceEnded(End::Succeeded { timings: None })),
            Just(Event::SourceEnded(End::Cancelled)),
            Just(Event::TargetNotOwner),
            Just(Event::TargetOwns),
            Just(Event::Fenced { reclaim: Epoch(3) }),
            Just(Event::Reclaimed),
            Just(Event::MachineGone),
        ]
    }

    proptest! {
        /// The machine is taken back only after a fence; it counts as moved only on the word of a host; an end is final.
        #[test]
        fn ownership_never_changes_on_a_guess(events in proptest::collection::vec(event(), 1..40)) {
            let mut state = State::Pending;
            let mut fenced = false;
            for event in events {
                let Ok(after) = next(&state, event.clone()) else { continue };
                fenced |= matches!(event, Event::Fenced { .. });
                if matches!(after, State::Reclaiming { .. }) {
                    prop_assert!(fenced);
                }
                if let State::Ended { end: End::Succeeded { .. } } = after {
                    let word = matches!(event, Event::TargetOwns | Event::SourceEnded(End::Succeeded { .. }));
                    prop_assert!(word);
                    prop_assert!(!matches!(state, State::Reclaiming { .. }), "taken back and moved");
                }
                if state.is_ended() {
                    let both = [&state, &after].map(|s| matches!(s, State::Ended { end: End::Succeeded { .. } }));
                    prop_assert_eq!(both, [true, true], "an end changed");
                }
                state = after;
            }
        }
    }
}
