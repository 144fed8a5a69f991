//! Lines of a file, one for a message.

use std::fmt::Write as _;
use std::path::Path;

use wire::frame::{Message, decode_whole, encode};

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").unwrap();
        text
    })
}

/// A line for one message, which is also read back.
pub(crate) fn line<M: Message + PartialEq + std::fmt::Debug>(version: u16, name: &str, message: M) -> String {
    let frame = encode(version, &message, 0).unwrap();
    assert_eq!(decode_whole::<M>(&frame), Ok((version, message)));
    format!("{name} {}\n", hex(&frame))
}

/// Compares lines with those of a file.
pub(crate) fn check(file: &str, now: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(file);
    if std::env::var_os("MASHINES_BLESS").is_some() {
        std::fs::write(&path, now).unwrap();
    }
    let then = std::fs::read_to_string(&path).unwrap();
    for (now, then) in now.lines().zip(then.lines()) {
        assert_eq!(now, then);
    }
    assert_eq!(now.lines().count(), then.lines().count());
}
