use super::*;

fn hostile(build: impl FnOnce(&mut Builder<Vec<u8>>)) -> Vec<u8> {
    let mut builder = Builder::new(Vec::new());
    build(&mut builder);
    builder.into_inner().unwrap()
}

/// Puts an entry in without the checks of the library that makes it.
fn entry(builder: &mut Builder<Vec<u8>>, name: &str, kind: EntryType, link: &str, content: &[u8]) {
    let mut header = Header::new_gnu();
    header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
    header.as_mut_bytes()[157..157 + link.len()].copy_from_slice(link.as_bytes());
    header.set_entry_type(kind);
    header.set_size(content.len() as u64);
    header.set_mode(0o4755);
    header.set_cksum();
    builder.append(&header, content).unwrap();
}

#[test]
fn what_is_packed_comes_out_the_same() {
    let from = tempfile::tempdir().unwrap();
    let tree = from.path().join("tree");
    fs::create_dir_all(tree.join("a/b")).unwrap();
    fs::write(tree.join("a/b/file"), b"content").unwrap();
    fs::set_permissions(tree.join("a/b/file"), fs::Permissions::from_mode(0o640)).unwrap();
    std::os::unix::fs::symlink("a/b/file", tree.join("link")).unwrap();
    let mut stream = Vec::new();
    pack(&tree, &mut stream).unwrap();
    let to = tempfile::tempdir().unwrap();
    unpack(stream.as_slice(), to.path()).unwrap();
    unpack(stream.as_slice(), &to.path().join("renamed")).unwrap();
    // Twice over the same is no error.
    unpack(stream.as_slice(), to.path()).unwrap();
    for name in ["tree", "renamed"] {
        let tree = to.path().join(name);
        assert_eq!(fs::read(tree.join("link")).unwrap(), b"content");
        assert_eq!(fs::metadata(tree.join("a/b/file")).unwrap().permissions().mode() & 0o7777, 0o640);
        assert_eq!(fs::read_link(tree.join("link")).unwrap(), Path::new("a/b/file"));
    }
}

#[test]
fn a_file_is_given_the_name_of_the_destination() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("one");
    fs::write(&file, b"1").unwrap();
    let mut stream = Vec::new();
    pack(&file, &mut stream).unwrap();
    unpack(stream.as_slice(), &directory.path().join("two")).unwrap();
    assert_eq!(fs::read(directory.path().join("two")).unwrap(), b"1");
    assert!(unpack(stream.as_slice(), &directory.path().join("no/such/place")).is_err());
    assert!(unpack(&stream[..700], directory.path()).is_err(), "ends early");
    assert!(unpack(&b""[..], directory.path()).is_err());
    assert!(pack(&directory.path().join("missing"), Vec::new()).is_err());
}

#[test]
fn nothing_is_written_elsewhere() {
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("secret"), b"s").unwrap();
    let target = outside.path().to_str().unwrap();
    let regular = EntryType::Regular;
    let streams = [
        hostile(|b| entry(b, "../evil", regular, "", b"x")),
        hostile(|b| entry(b, "a/../../evil", regular, "", b"x")),
        hostile(|b| entry(b, "/evil", regular, "", b"x")),
        hostile(|b| {
            entry(b, "door", EntryType::Symlink, target, b"");
            entry(b, "door/evil", regular, "", b"x");
        }),
        hostile(|b| {
            entry(b, "door", EntryType::Symlink, target, b"");
            entry(b, "door", EntryType::Directory, "", b"");
            entry(b, "door/evil", regular, "", b"x");
        }),
        hostile(|b| entry(b, "stolen", EntryType::Link, "../secret", b"")),
        hostile(|b| {
            entry(b, "door", EntryType::Symlink, target, b"");
            entry(b, "stolen", EntryType::Link, "door/secret", b"");
        }),
    ];
    for (number, stream) in streams.iter().enumerate() {
        let to = outside.path().join(format!("to-{number}"));
        fs::create_dir(&to).unwrap();
        assert!(matches!(unpack(stream.as_slice(), &to), Err(ArchiveError::Elsewhere(_))), "{number}");
        assert!(!outside.path().join("evil").exists(), "{number}");
        assert!(!to.join("stolen").exists(), "{number}");
    }
    // A link that points elsewhere is replaced by a file of its name, not written through.
    let to = outside.path().join("to");
    fs::create_dir(&to).unwrap();
    let through = hostile(|b| {
        entry(b, "f", EntryType::Symlink, &format!("{target}/secret"), b"");
        entry(b, "f", regular, "", b"x");
        entry(b, "null", EntryType::Char, "", b"");
    });
    unpack(through.as_slice(), &to).unwrap();
    assert_eq!(fs::read(outside.path().join("secret")).unwrap(), b"s");
    assert_eq!(
        fs::symlink_metadata(to.join("f")).unwrap().permissions().mode() & 0o7777,
        0o755,
        "no set-user-id"
    );
    assert!(!to.join("null").exists());
}
