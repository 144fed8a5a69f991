//! What the benchmarks share.
//!
//! * [`api`]: the control plane's REST API, with as little between the clock and the socket as can be.
//! * [`bed`]: a fleet to measure on, and the programs it is made of.
//! * [`cpu`]: what the processes of a fleet used, by the kernel's own accounts.
//! * [`spread`]: the distribution of what was measured.
//! * [`place`]: where and on what it was measured; printed with each result, since a figure without it says nothing.

pub mod api;
pub mod bed;
pub mod cpu;
pub mod place;
pub mod spread;
