//! Everything that a run depends on besides its seed.

/// Which faults may be injected, and how much of each. A run draws its own number of each fault, up to what is here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Times the link is cut, in one direction or both, for a while.
    pub link_cuts: u64,
    /// Crashes of the source's `mashined` (its VMM lives on), each followed by a restart.
    pub source_crashes: u64,
    /// Crashes of the target's `mashined`, each followed by a restart.
    pub target_crashes: u64,
    /// Deaths of a VMM process.
    pub vmm_deaths: u64,
    /// Cancels from the user.
    pub cancels: u64,
    /// Fences and forgets that the control plane sends for no good reason.
    pub fences: u64,
    /// Late copies of messages that open a connection, and of commands of the control plane.
    pub duplicates: bool,
    /// Messages that take far longer than others, each on its own stream.
    pub slow_messages: bool,
    /// Refusals: too little RAM for the first attempts, failing operations.
    pub failing_operations: bool,
    /// A rule that is broken on purpose, to prove that the checks find it.
    pub mutation: Option<Mutation>,
    /// Keep a line for each event.
    pub trace: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            link_cuts: 3,
            source_crashes: 2,
            target_crashes: 2,
            vmm_deaths: 1,
            cancels: 2,
            fences: 2,
            duplicates: true,
            slow_messages: true,
            failing_operations: true,
            mutation: None,
            trace: false,
        }
    }
}

impl Options {
    /// A fair-weather run.
    pub const fn calm() -> Self {
        Self {
            link_cuts: 0,
            source_crashes: 0,
            target_crashes: 0,
            vmm_deaths: 0,
            cancels: 0,
            fences: 0,
            duplicates: false,
            slow_messages: false,
            failing_operations: false,
            mutation: None,
            trace: false,
        }
    }
}

/// Rules broken on purpose. Each must be found within a bounded number of seeds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mutation {
    /// The source resumes the guest when the link is lost while it is in doubt, and its VMM lets it.
    ResumeInDoubt,
    /// A restarted source resumes its VMM without asking whether it was given away, and the VMM lets it.
    RestartResumesDisowned,
    /// `Commit` leaves before the VMM has recorded the disowning, and a failure then resumes the guest.
    CommitBeforeDisown,
    /// The target reports a round's end before its last pages are in memory.
    RoundEndBeforePages,
    /// After a reconnect the dirty bits of what was in flight stay lost.
    DirtyBitsNotGivenBack,
    /// A page is read first and its dirty bit taken after.
    ReadBeforeTake,
    /// Old lanes go on writing after the target said how far they got.
    LanesNotHalted,
    /// The target's host confirms a fence without dropping the copy.
    FenceWithoutDrop,
    /// The control plane reclaims without fencing the target.
    ReclaimWithoutFence,
    /// A restarted target drops a VMM that runs already.
    RestartDropsRunning,
    /// The target runs the state of an earlier, failed switch-over.
    StaleState,
    /// The guest is not stopped before the final round.
    NoPause,
}

impl Mutation {
    /// All of them.
    pub const ALL: [Self; 12] = [
        Self::ResumeInDoubt,
        Self::RestartResumesDisowned,
        Self::CommitBeforeDisown,
        Self::RoundEndBeforePages,
        Self::DirtyBitsNotGivenBack,
        Self::ReadBeforeTake,
        Self::LanesNotHalted,
        Self::FenceWithoutDrop,
        Self::ReclaimWithoutFence,
        Self::RestartDropsRunning,
        Self::StaleState,
        Self::NoPause,
    ];
}
