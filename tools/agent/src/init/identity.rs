//! Who this machine is: names, keys, variables and user data, written into the image's root at each boot.
//!
//! An image belongs to its user: what is there already stays. A step that fails (a root that is read-only) is named, and the boot goes on.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Stdio};

use base64::Engine as _;
use wire::ids::MachineId;

use super::config::Config;
use crate::say;
use crate::users::User;

/// Search path before the image has set one.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Does all of it.
pub fn establish(config: &Config) {
    let tried = |what: &str, result: io::Result<()>| {
        if let Err(error) = result {
            say!("{what}: {error}");
        }
    };
    if let Some(name) = &config.hostname {
        tried("setting the host name", set_hostname(name));
    }
    if let Some(id) = config.machine_id.as_ref().and_then(|id| id.parse().ok()) {
        tried("writing /etc/machine-id", write_if_empty("/etc/machine-id", &machine_id(id), true));
    }
    if !config.network.dns.is_empty() {
        let lines: String = config.network.dns.iter().map(|dns| format!("nameserver {dns}\n")).collect();
        tried("writing /etc/resolv.conf", write_if_empty("/etc/resolv.conf", &lines, false));
    }
    if !config.ssh_keys.is_empty() {
        tried("writing root's authorized_keys", authorize(&config.ssh_keys));
    }
    tried("making SSH host keys", host_keys());
    tried("writing /run/mashines/env", write_variables(&config.variables()));
    if let Some(data) = &config.user_data_base64 {
        tried("writing the user data", seed(config, data));
    }
}

fn set_hostname(name: &str) -> io::Result<()> {
    rustix::system::sethostname(name.as_bytes())?;
    // The image's init sets what the file says.
    fs::write("/etc/hostname", format!("{name}\n"))
}

/// 32 hex digits: the machine's 16, and 16 that follow from them.
fn machine_id(id: MachineId) -> String {
    let id = id.as_u64();
    let mixed = (id ^ (id >> 31)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    format!("{id:016x}{:016x}\n", mixed ^ (mixed >> 29))
}

/// Writes a file that is missing, empty, or (as systemd says it) `uninitialized`. A link is the image's own arrangement.
fn write_if_empty(path: &str, content: &str, is_id: bool) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(metadata) if !metadata.is_file() => return Ok(()),
        Ok(_) => {
            let there = fs::read_to_string(path)?;
            let there = there.trim();
            if !(there.is_empty() || is_id && there == "uninitialized") {
                return Ok(());
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    fs::write(path, content)
}

fn authorize(keys: &[String]) -> io::Result<()> {
    let root = User::find("root")?.unwrap_or_else(User::root);
    let directory = Path::new(&root.home).join(".ssh");
    fs::create_dir_all(&directory)?;
    fs::set_permissions(&directory, fs::Permissions::from_mode(0o700))?;
    let path = directory.join("authorized_keys");
    let there = match fs::read_to_string(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        read => read?,
    };
    let lines = missing(&there, keys);
    let mut file = fs::OpenOptions::new().create(true).append(true).mode(0o600).open(&path)?;
    file.set_permissions(fs::Permissions::from_mode(0o600))?;
    file.write_all(lines.as_bytes())
}

/// Lines to append, for keys that are not there.
fn missing(there: &str, keys: &[String]) -> String {
    let mut lines = String::new();
    for key in keys.iter().flat_map(|key| key.lines()).map(str::trim).filter(|key| !key.is_empty()) {
        if !there.lines().any(|line| line.trim() == key) {
            lines.push_str(key);
            lines.push('\n');
        }
    }
    if !lines.is_empty() && !there.is_empty() && !there.ends_with('\n') {
        lines.insert(0, '\n');
    }
    lines
}

/// One key at once, so that sshd can start; the slow ones while the image boots.
fn host_keys() -> io::Result<()> {
    let Ok(entries) = fs::read_dir("/etc/ssh") else { return Ok(()) };
    let is_key = |name: &str| name.starts_with("ssh_host_") && name.ends_with("_key");
    let generator =
        ["/usr/bin/ssh-keygen", "/usr/local/bin/ssh-keygen"].iter().find(|path| Path::new(path).exists());
    let any = entries.flatten().any(|entry| entry.file_name().to_str().is_some_and(is_key));
    let Some(generator) = generator.filter(|_| !any) else { return Ok(()) };
    let command = |arguments: &[&str]| {
        let mut command = Command::new(generator);
        command.args(arguments).env_clear().env("PATH", PATH).stdin(Stdio::null()).stdout(Stdio::null());
        command
    };
    let first = ["-q", "-t", "ed25519", "-N", "", "-f", "/etc/ssh/ssh_host_ed25519_key"];
    let made = command(&first).status()?;
    if !made.success() {
        return Err(io::Error::other(format!("ssh-keygen: {made}")));
    }
    // Whoever is process 1 by then takes its end.
    command(&["-A"]).spawn().map(drop)
}

/// The form that systemd's `EnvironmentFile=` and a shell read alike.
fn environment_file(variables: &BTreeMap<String, String>) -> String {
    let mut text = String::new();
    for (name, value) in variables {
        text.push_str(name);
        text.push_str("=\"");
        for letter in value.chars() {
            if matches!(letter, '"' | '\\' | '$' | '`') {
                text.push('\\');
            }
            text.push(letter);
        }
        text.push_str("\"\n");
    }
    text
}

fn write_variables(variables: &BTreeMap<String, String>) -> io::Result<()> {
    fs::create_dir_all("/run/mashines")?;
    let mut file = fs::OpenOptions::new();
    let mut file = file.create(true).write(true).truncate(true).mode(0o600).open("/run/mashines/env")?;
    file.write_all(environment_file(variables).as_bytes())
}

fn seed(config: &Config, data: &str) -> io::Result<()> {
    let compact: String = data.split_whitespace().collect();
    let data = base64::engine::general_purpose::STANDARD.decode(compact).map_err(io::Error::other)?;
    let directory = Path::new("/var/lib/cloud/seed/nocloud");
    fs::create_dir_all(directory)?;
    fs::set_permissions(directory, fs::Permissions::from_mode(0o700))?;
    let id = config.machine_id.as_deref().unwrap_or("mashine");
    let name = config.hostname.as_deref().unwrap_or("mashine");
    fs::write(directory.join("meta-data"), format!("instance-id: {id}\nlocal-hostname: {name}\n"))?;
    fs::write(directory.join("user-data"), data)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_missing_keys_are_appended() {
        let keys = ["ssh-ed25519 A a\n".to_owned(), "ssh-ed25519 B b".to_owned()];
        assert_eq!(missing("", &keys), "ssh-ed25519 A a\nssh-ed25519 B b\n");
        assert_eq!(missing("ssh-ed25519 A a", &keys), "\nssh-ed25519 B b\n");
        assert_eq!(missing("ssh-ed25519 B b\nssh-ed25519 A a\n", &keys), "");
    }

    #[test]
    fn an_image_s_own_files_stay() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("id").to_str().unwrap().to_owned();
        for (before, after) in
            [(None, "new"), (Some("\n"), "new"), (Some("old"), "old"), (Some("uninitialized\n"), "new")]
        {
            let _ = fs::remove_file(&path);
            if let Some(text) = before {
                fs::write(&path, text).unwrap();
            }
            write_if_empty(&path, "new", true).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), after, "{before:?}");
        }
        assert_eq!(machine_id(MachineId::from_u64(7)).trim().len(), 32);
    }

    #[test]
    fn a_shell_reads_the_variables_as_they_were() {
        let value = "two\nlines \"quoted\" $HOME `x` \\ '";
        let variables = BTreeMap::from([("A".to_owned(), value.to_owned())]);
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("env"), environment_file(&variables)).unwrap();
        let read = Command::new("sh")
            .args(["-c", ". ./env; printf %s \"$A\""])
            .current_dir(directory.path())
            .output();
        assert_eq!(String::from_utf8(read.unwrap().stdout).unwrap(), value);
    }
}
