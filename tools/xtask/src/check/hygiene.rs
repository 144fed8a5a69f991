//! Small things that make diffs noisy or clones large.

use anyhow::{Context, Result};

use crate::sources::{self, Source};

/// Largest file in the repository, in bytes; golden files and lock files are far below.
const BYTES_MAX: u64 = 512 * 1024;

/// What is not tidy.
pub fn violations() -> Result<Vec<String>> {
    let mut found = Vec::new();
    for file in sources::ending_with(&[".rs", ".toml", ".md", ".s", ".ld", ".sh", ".yml"])? {
        found.extend(untidy(&file));
    }
    for path in sources::paths()? {
        let file = sources::absolute(&path);
        if file.is_file() {
            let bytes = file.metadata().with_context(|| format!("looking at {path}"))?.len();
            if bytes > BYTES_MAX {
                found.push(format!("{path}: {bytes} bytes, {BYTES_MAX} are the most"));
            }
        }
    }
    Ok(found)
}

fn untidy(file: &Source) -> Vec<String> {
    let Source { path, text } = file;
    let mut found = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        if line.trim_end() != line {
            found.push(format!("{path}:{number}: white space at the end of the line"));
        }
        if ["<<<<<<< ", ">>>>>>> "].iter().any(|mark| line.starts_with(mark)) {
            found.push(format!("{path}:{number}: unresolved merge"));
        }
        if path.ends_with(".rs") && line.contains('\t') {
            found.push(format!("{path}:{number}: tab"));
        }
    }
    if !text.is_empty() && !text.ends_with('\n') {
        found.push(format!("{path}: no newline at the end"));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn untidy_files_are_found() {
        let file = |text: &str| Source { path: "a.rs".to_owned(), text: text.to_owned() };
        assert!(untidy(&file("fn a() {}\n")).is_empty());
        for bad in ["a \n", "\ta\n", "a", "<<<<<<< HEAD\n"] {
            assert_eq!(untidy(&file(bad)).len(), 1, "{bad:?}");
        }
    }
}
