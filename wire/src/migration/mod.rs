//! The migration protocol.
//!
//! ```text
//! source mashined                                           target mashined
//!   Offer{versions, spec, epochs, lanes, attempt} ------------>  checks, reserves RAM, makes the VM
//!   <------------------ Accept{version, lanes, resume} | Refuse{code, detail}
//!   lanes: Batch* RoundEnd(1), Batch* RoundEnd(2), ...  ======>  applies
//!   <------------------------------------ RoundReceived{round}   (never waited for between rounds)
//!   pause; lanes: Batch* RoundEnd(final)  ====================>  applies ...
//!   Final{round, state} -------------------------------------->  ... while it loads the state and installs the route
//!   <------------------------------------ Ready{round, digest}
//!   the VMM records that the machine is given away
//!   Commit{migration, epoch} --------------------------------->  runs it
//!   <------------------------------- Running{epoch, ...}
//!   Finished ------------------------------------------------->
//! ```
//!
//! Both ends are pure state machines, [`source::Source`] and [`target::Target`]: they are given events and the time, and
//! answer with actions for their host to carry out. They hold no sockets, clocks or memory of guests, so that the
//! simulator (`tests/sim`) can drive both through every order of events and every crash.
//!
//! What must always hold, and why it does:
//!
//! 1. *Never two running copies.* `Commit` is sent only after the source's VMM has recorded the disowning, and that VMM
//!    then refuses to run. The target runs only on a `Commit` that names its migration, epoch and connection attempt, and
//!    never again after it began to discard. After the disowning the source resumes only by [`source::SourceEvent::Reclaim`],
//!    which the control plane gives once the target has been fenced.
//! 2. *Never a silent loss.* What was sent but is not proven applied goes back to the dirty bitmap ([`ledger::Ledger`]),
//!    and `Ready` is sent only when each lane has ended the final round.
//! 3. *A broken link costs nothing before the pause.* Both ends keep what they have, for a bounded time; after a
//!    reconnect the target says what it has and the source goes on in a new round.
//! 4. *Cancel works until the source asks its VMM to record the disowning*, which is the moment before `Commit`.
//!
//! A peer that breaks the protocol, and an event that its state does not allow, end the migration with an abort; the
//! machine then goes on where it is owned.

pub mod convergence;
pub mod lane;
pub mod ledger;
pub mod messages;
pub mod source;
pub mod target;
