//! Memory: what the VMM gave, how it is handed out, and the pages that are dirtied and verified.

pub mod frames;
pub mod managed;
pub mod map;
pub mod orders;
pub mod window;
pub mod worker;
