//! Users and their groups, from `/etc/passwd` and `/etc/group`.
//!
//! The program is linked statically, so there is no NSS: users that exist only in LDAP or the like are not found.
//! Lines that are not as they should be are passed over, as libc does.

use std::fs;
use std::io;
use std::path::Path;

/// A user as a program's start needs it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// Login name.
    pub name: String,
    /// User id.
    pub uid: u32,
    /// Primary group.
    pub gid: u32,
    /// All groups, the primary one included.
    pub groups: Vec<u32>,
    /// Home directory.
    pub home: String,
    /// Login shell.
    pub shell: String,
}

/// Longest file that is read: a guest may hold anything there.
const FILE_BYTES_MAX: u64 = 4 << 20;

impl User {
    /// Root where no `/etc/passwd` knows him: an image may have none.
    pub fn root() -> Self {
        Self {
            name: "root".into(),
            uid: 0,
            gid: 0,
            groups: vec![0],
            home: "/root".into(),
            shell: "/bin/sh".into(),
        }
    }

    /// Looks a user up by name, or by number.
    ///
    /// # Errors
    /// When the files exist and cannot be read.
    pub fn find(wanted: &str) -> io::Result<Option<Self>> {
        let passwd = read("/etc/passwd")?;
        let group = read("/etc/group")?;
        let found = find_in(&passwd, &group, wanted);
        Ok(found.or_else(|| matches!(wanted, "root" | "0").then(Self::root)))
    }
}

fn read(path: &str) -> io::Result<String> {
    match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(String::new()),
        Ok(metadata) if metadata.len() > FILE_BYTES_MAX || !metadata.is_file() => {
            return Err(io::Error::other(format!("{path} is no file of a sensible size")));
        }
        _ => {}
    }
    Ok(String::from_utf8_lossy(&fs::read(Path::new(path))?).into_owned())
}

fn find_in(passwd: &str, group: &str, wanted: &str) -> Option<User> {
    let all = || passwd.lines().filter_map(parse);
    let mut user = all()
        .find(|user| user.name == wanted)
        .or_else(|| wanted.parse().ok().and_then(|uid: u32| all().find(|user| user.uid == uid)))?;
    user.groups = groups(group, &user);
    Some(user)
}

fn parse(line: &str) -> Option<User> {
    let fields: Vec<&str> = line.split(':').collect();
    let [name, _, uid, gid, _, home, shell] = fields.as_slice() else { return None };
    let or = |text: &str, other: &str| if text.is_empty() { other.to_owned() } else { text.to_owned() };
    Some(User {
        name: or(name, "?"),
        uid: uid.parse().ok()?,
        gid: gid.parse().ok()?,
        groups: Vec::new(),
        home: or(home, "/"),
        shell: or(shell, "/bin/sh"),
    })
}

fn groups(group: &str, user: &User) -> Vec<u32> {
    let mut ids = vec![user.gid];
    for line in group.lines() {
        let fields: Vec<&str> = line.split(':').collect();
        let [_, _, gid, members] = fields.as_slice() else { continue };
        let Ok(gid) = gid.parse() else { continue };
        if members.split(',').any(|member| member == user.name) && !ids.contains(&gid) {
            ids.push(gid);
        }
    }
    ids
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/bash\nbroken\nworse:x:one:1::/:/bin/sh\n\
        web:x:1000:1000:Web,,,:/srv/web:/bin/zsh\nbare:x:1001:1001:::\n";
    const GROUP: &str = "root:x:0:\ndocker:x:999:web,root\nweb:x:1000:web\nbroken:x\nadm:x:4:syslog,web\n";

    #[test]
    fn users_are_found_by_name_and_number_with_their_groups() {
        let web = find_in(PASSWD, GROUP, "web").unwrap();
        assert_eq!((web.uid, web.home.as_str(), web.shell.as_str()), (1000, "/srv/web", "/bin/zsh"));
        assert_eq!(web.groups, [1000, 999, 4]);
        assert_eq!(find_in(PASSWD, GROUP, "1000"), Some(web));
        let bare = find_in(PASSWD, GROUP, "bare").unwrap();
        assert_eq!((bare.home.as_str(), bare.shell.as_str()), ("/", "/bin/sh"));
        for missing in ["worse", "broken", "77", "", "we"] {
            assert_eq!(find_in(PASSWD, GROUP, missing), None, "{missing}");
        }
    }
}
