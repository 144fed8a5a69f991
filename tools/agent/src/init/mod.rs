//! From the kernel's first process to the image's own init.

pub mod network;

/// Runs as process 1.
pub fn run() -> ! {
    loop {
        std::thread::park();
    }
}
