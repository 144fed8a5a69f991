//! `key add`, `key ls`, `key rm`: SSH public keys that every machine launched from here lets in.
//!
//! They lie in `keys` beside the configuration, in the form of OpenSSH's authorized_keys: one key a line. Nobody else sees them but the machines.

use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};

use serde_json::json;

use crate::args::Key;
use crate::config;
use crate::exit::Failure;
use crate::output;

/// Longest file of keys that is read, in bytes.
const FILE_BYTES_MAX: u64 = 256 << 10;

pub(super) fn run(command: &Key, json: bool) -> Result<(), Failure> {
    match command {
        Key::Add { file } => add(file, json),
        Key::Ls => list(json),
        Key::Rm { key } => remove(key, json),
    }
}

/// The keys that were added.
pub(super) fn known() -> Result<Vec<String>, Failure> {
    let path = path()?;
    if path.exists() { read(&path) } else { Ok(Vec::new()) }
}

/// The public keys in a file; `-` is standard input.
pub(super) fn read(file: &Path) -> Result<Vec<String>, Failure> {
    let failed = |error| {
        Failure::local(format!("reading {}", file.display()), error, "give a file with public keys (.pub)")
    };
    let mut text = String::new();
    if file == Path::new("-") {
        std::io::stdin().take(FILE_BYTES_MAX).read_to_string(&mut text).map_err(failed)?;
    } else {
        let opened = std::fs::File::open(file).map_err(failed)?;
        opened.take(FILE_BYTES_MAX).read_to_string(&mut text).map_err(failed)?;
    }
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    let keys: Vec<String> = lines.map(str::to_owned).collect();
    if let Some(bad) = keys.iter().find(|key| !is_public_key(key)) {
        let shown: String = bad.chars().take(40).collect();
        return Err(Failure::usage(
            format!("`{shown}...` in {} is no SSH public key", file.display()),
            "give the .pub file, whose lines are like `ssh-ed25519 AAAA... name`; never a private key",
        ));
    }
    Ok(keys)
}

/// `TYPE BASE64 COMMENT`; options in front are not supported, because machines take keys without them.
fn is_public_key(line: &str) -> bool {
    let mut words = line.split_whitespace();
    let known = ["ssh-", "ecdsa-", "sk-"];
    let kind = words.next().is_some_and(|kind| known.iter().any(|prefix| kind.starts_with(prefix)));
    kind && words.next().is_some_and(|blob| blob.starts_with("AAAA"))
}

fn add(file: &Path, json: bool) -> Result<(), Failure> {
    let mut keys = known()?;
    let mut added = 0;
    for key in read(file)? {
        if !keys.contains(&key) {
            keys.push(key);
            added += 1;
        }
    }
    write(&keys)?;
    if json {
        return output::json(&json!({"added": added, "keys": keys}));
    }
    eprintln!("{added} added, {} in all", keys.len());
    Ok(())
}

fn list(json: bool) -> Result<(), Failure> {
    let keys = known()?;
    if json {
        return output::json(&json!({"keys": keys}));
    }
    let rows: Vec<_> = (1..).zip(&keys).map(|(number, key)| row(number, key)).collect();
    output::table(&["NUMBER", "TYPE", "COMMENT"], &rows)
}

fn row(number: usize, key: &str) -> Vec<String> {
    let kind = key.split_whitespace().next().unwrap_or_default();
    vec![number.to_string(), kind.to_owned(), comment(key)]
}

fn comment(key: &str) -> String {
    key.split_whitespace().skip(2).collect::<Vec<_>>().join(" ")
}

fn remove(which: &str, json: bool) -> Result<(), Failure> {
    let keys = known()?;
    let matches = |number: usize, key: &str| {
        which.parse() == Ok(number) || (!which.is_empty() && comment(key) == which)
    };
    let kept: Vec<String> =
        (1..).zip(&keys).filter(|(number, key)| !matches(*number, key)).map(|(_, key)| key.clone()).collect();
    if kept.len() == keys.len() {
        return Err(Failure::usage(
            format!("there is no key `{which}`"),
            "give its number or comment from `mashines key ls`",
        ));
    }
    write(&kept)?;
    if json {
        return output::json(&json!({"keys": kept}));
    }
    eprintln!("removed; machines that were launched with it still let it in");
    Ok(())
}

fn path() -> Result<PathBuf, Failure> {
    config::directory()
        .map(|directory| directory.join("keys"))
        .ok_or_else(|| Failure::usage("there is no place for keys", "set HOME or MASHINES_CONFIG"))
}

fn write(keys: &[String]) -> Result<(), Failure> {
    let path = path()?;
    let failed = |error: std::io::Error| {
        Failure::local(format!("writing {}", path.display()), error, "check the directory's permissions")
    };
    let directory = path.parent().unwrap_or(&path);
    std::fs::create_dir_all(directory).map_err(failed)?;
    let draft = path.with_extension(format!("tmp{}", std::process::id()));
    let mut file = std::fs::File::create(&draft).map_err(failed)?;
    let text: String = keys.iter().map(|key| format!("{key}\n")).collect();
    file.write_all(text.as_bytes()).and_then(|()| std::fs::rename(&draft, &path)).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn private_keys_and_noise_are_refused() {
        assert!(is_public_key("ssh-ed25519 AAAAC3Nza me@here"));
        assert!(is_public_key("ecdsa-sha2-nistp256 AAAAE2Vj"));
        for bad in
            ["", "-----BEGIN OPENSSH PRIVATE KEY-----", "ssh-rsa", "ssh-rsa BBBB", "no-pty ssh-rsa AAAA"]
        {
            assert!(!is_public_key(bad), "{bad}");
        }
    }

    #[test]
    fn comments_may_have_spaces() {
        assert_eq!(comment("ssh-ed25519 AAAA my laptop"), "my laptop");
        assert_eq!(row(3, "ssh-ed25519 AAAA me"), ["3", "ssh-ed25519", "me"]);
    }
}
