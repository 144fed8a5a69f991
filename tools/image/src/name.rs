//! Names of images: `debian-12`, or with a tag `web:v3`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Longest name, and longest tag.
const LONGEST: usize = 63;

/// The name of an image in a store.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ImageName {
    name: String,
    tag: Option<String>,
}

/// A name that is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is not an image's name: give 1 to 63 of a-z, 0-9, `.`, `_`, `-`, beginning with a letter or digit, and perhaps `:` and a tag of the same kind"
)]
pub struct BadName(String);

impl ImageName {
    /// The manifest's file: a name never contains `@`, `/` or a leading dot, so names and files are one to one.
    pub fn file(&self) -> String {
        match &self.tag {
            Some(tag) => format!("{}@{tag}.json", self.name),
            None => format!("{}.json", self.name),
        }
    }

    /// The name that a manifest's file stands for.
    pub fn from_file(file: &str) -> Option<Self> {
        let stem = file.strip_suffix(".json")?;
        match stem.split_once('@') {
            Some((name, tag)) => Self::new(name, Some(tag)).ok(),
            None => Self::new(stem, None).ok(),
        }
    }

    fn new(name: &str, tag: Option<&str>) -> Result<Self, BadName> {
        if fits(name) && tag.is_none_or(fits) {
            return Ok(Self { name: name.to_owned(), tag: tag.map(str::to_owned) });
        }
        let shown = tag.map_or_else(|| name.to_owned(), |tag| format!("{name}:{tag}"));
        Err(BadName(shown.chars().take(140).collect()))
    }

    /// A name made of any text: what does not fit becomes `-`. For images that are imported without a name.
    pub fn made_from(text: &str) -> Option<Self> {
        let last = text.rsplit('/').next().unwrap_or(text);
        let keep = |part: &str| -> String {
            let lower = part.to_ascii_lowercase();
            let fitting = lower
                .chars()
                .map(|c| if c.is_ascii() && part_byte(u8::try_from(c).unwrap_or(b'/')) { c } else { '-' });
            fitting.take(LONGEST).collect::<String>().trim_matches(['-', '.', '_']).to_owned()
        };
        match last.split_once(':') {
            Some((name, tag)) if tag != "latest" => Self::new(&keep(name), Some(&keep(tag))).ok(),
            Some((name, _)) => Self::new(&keep(name), None).ok(),
            None => Self::new(&keep(last), None).ok(),
        }
    }
}

const fn part_byte(byte: u8) -> bool {
    matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'_' | b'-')
}

fn fits(part: &str) -> bool {
    let first = part.bytes().next().is_some_and(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit());
    first && part.len() <= LONGEST && part.bytes().all(part_byte)
}

impl FromStr for ImageName {
    type Err = BadName;

    fn from_str(text: &str) -> Result<Self, BadName> {
        match text.split_once(':') {
            Some((name, tag)) => Self::new(name, Some(tag)),
            None => Self::new(text, None),
        }
    }
}

impl fmt::Display for ImageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.tag {
            Some(tag) => write!(f, "{}:{tag}", self.name),
            None => f.write_str(&self.name),
        }
    }
}

impl TryFrom<String> for ImageName {
    type Error = BadName;

    fn try_from(text: String) -> Result<Self, BadName> {
        text.parse()
    }
}

impl From<ImageName> for String {
    fn from(name: ImageName) -> Self {
        name.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_files_are_one_to_one() {
        for (text, file) in [
            ("debian-12", "debian-12.json"),
            ("web:v3", "web@v3.json"),
            ("a.b_c", "a.b_c.json"),
            ("9", "9.json"),
        ] {
            let name: ImageName = text.parse().unwrap();
            assert_eq!(name.file(), file);
            assert_eq!(ImageName::from_file(file), Some(name.clone()));
            assert_eq!(name.to_string(), text);
        }
    }

    #[test]
    fn what_is_no_name_is_refused() {
        let long = "a".repeat(64);
        for bad in
            ["", ":", "a:", ":b", "../x", "a/b", "A", ".hidden", "-x", "a@b", "a:b:c", "a b", "ä", &long]
        {
            assert!(bad.parse::<ImageName>().is_err(), "{bad}");
        }
        for file in ["a.txt", "../x.json", ".json", "a@b@c.json", ".a.json.tmp"] {
            assert_eq!(ImageName::from_file(file), None, "{file}");
        }
    }

    #[test]
    fn names_are_made_from_references() {
        for (text, name) in [
            ("registry.example:5000/a/Web_App:V3", Some("web_app:v3")),
            ("debian:latest", Some("debian")),
            ("/tmp/x y.tar", Some("x-y.tar")),
            ("///", None),
            ("ä", None),
        ] {
            assert_eq!(ImageName::made_from(text).map(|name| name.to_string()).as_deref(), name, "{text}");
        }
    }
}
