//! Page sets.
