//! Text of bounded length, for replies and serial lines.
//!
//! What does not fit is cut off at a character boundary; `Text` never fails and never panics, because it also
//! carries panic messages.

use core::fmt;

/// A string of at most `N` bytes.
#[derive(Clone)]
pub struct Text<const N: usize> {
    bytes: [u8; N],
    len: usize,
}

impl<const N: usize> Text<N> {
    /// The empty text.
    #[must_use]
    pub const fn new() -> Self {
        Self { bytes: [0; N], len: 0 }
    }

    /// The text as far as it fits.
    #[must_use]
    pub fn from_args(args: fmt::Arguments<'_>) -> Self {
        let mut text = Self::new();
        // Writing to a Text cannot fail.
        let _ = fmt::write(&mut text, args);
        text
    }

    /// What has been written.
    #[must_use]
    pub fn as_str(&self) -> &str {
        core::str::from_utf8(&self.bytes[..self.len]).unwrap_or("")
    }

    /// Its bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl<const N: usize> Default for Text<N> {
    fn default() -> Self {
        Self::new()
    }
}

impl<const N: usize> fmt::Write for Text<N> {
    fn write_str(&mut self, s: &str) -> fmt::Result {
        for c in s.chars() {
            let mut utf8 = [0; 4];
            let utf8 = c.encode_utf8(&mut utf8).as_bytes();
            if self.len + utf8.len() > N {
                break;
            }
            self.bytes[self.len..self.len + utf8.len()].copy_from_slice(utf8);
            self.len += utf8.len();
        }
        Ok(())
    }
}

/// `null` for `None`, for JSON.
pub struct OrNull<T>(pub Option<T>);

impl<T: fmt::Display> fmt::Display for OrNull<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Some(value) => value.fmt(f),
            None => f.write_str("null"),
        }
    }
}

/// `-` for `None`, for lines that people read.
pub struct OrDash<T>(pub Option<T>);

impl<T: fmt::Display> fmt::Display for OrDash<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Some(value) => value.fmt(f),
            None => f.write_str("-"),
        }
    }
}

/// A string as a quoted JSON string.
pub struct Quoted<'a>(pub &'a str);

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("\"")?;
        for c in self.0.chars() {
            match c {
                '"' | '\\' => write!(f, "\\{c}")?,
                c if c.is_control() => write!(f, "\\u{:04x}", u32::from(c))?,
                c => write!(f, "{c}")?,
            }
        }
        f.write_str("\"")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cuts_at_a_character() {
        let text = Text::<4>::from_args(format_args!("abcé!"));
        assert_eq!(text.as_str(), "abc");
    }

    #[test]
    fn quotes_what_json_forbids() {
        assert_eq!(format!("{}", Quoted("a\"b\\c\nd")), r#""a\"b\\c\u000ad""#);
        assert_eq!(format!("{}", OrNull(None::<u8>)), "null");
    }
}
