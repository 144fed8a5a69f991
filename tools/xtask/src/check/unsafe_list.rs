//! `unsafe` is in the files that ARCHITECTURE.md lists, and in no others; and no file is listed that has none.

use std::collections::BTreeSet;

use anyhow::{Context, Result};

use crate::sources::{self, Source};

/// Lines around the list in ARCHITECTURE.md.
const BEGIN: &str = "<!-- unsafe files -->";
const END: &str = "<!-- end of unsafe files -->";

/// Where list and code differ.
pub fn violations() -> Result<Vec<String>> {
    let document = sources::absolute("ARCHITECTURE.md");
    let text = std::fs::read_to_string(&document).context("reading ARCHITECTURE.md")?;
    let listed = listed(&text).with_context(|| format!("ARCHITECTURE.md has no lines {BEGIN} and {END}"))?;
    let used = users(&sources::ending_with(&[".rs"])?);
    let missing = used
        .difference(&listed)
        .map(|path| format!("{path}: has `unsafe` and is not listed in ARCHITECTURE.md"));
    let stale =
        listed.difference(&used).map(|path| format!("{path}: listed in ARCHITECTURE.md and has no `unsafe`"));
    Ok(missing.chain(stale).collect())
}

/// Paths in backquotes between the two marks.
fn listed(document: &str) -> Option<BTreeSet<String>> {
    let (_, rest) = document.split_once(BEGIN)?;
    let (list, _) = rest.split_once(END)?;
    Some(list.split('`').skip(1).step_by(2).filter(|word| word.ends_with(".rs")).map(str::to_owned).collect())
}

fn users(files: &[Source]) -> BTreeSet<String> {
    files.iter().filter(|file| uses_unsafe(&file.text)).map(|file| file.path.clone()).collect()
}

/// Whether the keyword stands in the code, outside comments and string literals on one line.
fn uses_unsafe(text: &str) -> bool {
    text.lines().any(|line| {
        let code = line.split("//").next().unwrap_or_default();
        let outside_strings: String = code.split('"').step_by(2).collect();
        outside_strings
            .split(|letter: char| !letter.is_alphanumeric() && letter != '_')
            .any(|word| word == "unsafe")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_keyword_is_told_from_words_in_text() {
        for code in
            ["unsafe { x() }", "pub unsafe fn x()", "#[unsafe(no_mangle)]", "    let y = unsafe{x()};"]
        {
            assert!(uses_unsafe(code), "{code}");
        }
        for text in ["// unsafe", "/// is unsafe {", "let unsafe_list = 1;", "print(\"unsafe {\")"] {
            assert!(!uses_unsafe(text), "{text}");
        }
    }

    #[test]
    fn the_list_is_between_the_marks() {
        let text = format!("`no.rs`\n{BEGIN}\n* `a/b.rs`: why\n* `c.rs`, `word`\n{END}\n`no.rs`");
        assert_eq!(listed(&text).unwrap().into_iter().collect::<Vec<_>>(), ["a/b.rs", "c.rs"]);
        assert!(listed("nothing").is_none());
    }
}
