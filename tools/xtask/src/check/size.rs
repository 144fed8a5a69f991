//! A file has one subject. Past [`LINES_MAX`] lines it has two.

use anyhow::Result;

use crate::sources::{self, Source};

/// Most lines of a file; most have 150 to 350.
const LINES_MAX: usize = 600;

/// Files that are too long.
pub fn violations() -> Result<Vec<String>> {
    Ok(too_long(&sources::ending_with(&[".rs", ".s"])?))
}

fn too_long(files: &[Source]) -> Vec<String> {
    files
        .iter()
        .map(|file| (file, file.text.lines().count()))
        .filter(|(_, lines)| *lines > LINES_MAX)
        .map(|(file, lines)| {
            format!("{}: {lines} lines, {LINES_MAX} are the most: it has more than one subject", file.path)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_is_exact() {
        let file = |lines: usize| Source { path: "a.rs".to_owned(), text: "x\n".repeat(lines) };
        assert!(too_long(&[file(LINES_MAX)]).is_empty());
        assert_eq!(too_long(&[file(LINES_MAX + 1)]).len(), 1);
    }
}
