//! What is in an initial RAM disk, read back.

use std::collections::BTreeMap;

use super::*;

fn program() -> Vec<u8> {
    let mut bytes = vec![0; 64];
    bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
    bytes[18] = 62;
    bytes
}

fn description() -> Description {
    Description { name: "x".parse().unwrap(), kernel: "6.1".to_owned(), config: Config::default() }
}

fn read_back(file: &Path) -> BTreeMap<String, (u32, Vec<u8>)> {
    let bytes = zstd::decode_all(fs::File::open(file).unwrap()).unwrap();
    let mut rest = &*bytes;
    let mut found = BTreeMap::new();
    loop {
        let mut reader = cpio::NewcReader::new(rest).unwrap();
        if reader.entry().is_trailer() {
            return found;
        }
        let (name, mode) = (reader.entry().name().to_owned(), reader.entry().mode());
        let mut content = Vec::new();
        reader.read_to_end(&mut content).unwrap();
        found.insert(name, (mode, content));
        rest = reader.finish().unwrap();
    }
}

#[test]
fn everything_is_where_init_looks_for_it() {
    let temporary = tempfile::tempdir().unwrap();
    let modules = temporary.path().join("6.1");
    fs::create_dir_all(modules.join("kernel")).unwrap();
    fs::write(modules.join("modules.builtin"), "kernel/fs/ext4/ext4.ko\n").unwrap();
    fs::write(modules.join("modules.dep"), "kernel/virtio_mmio.ko:\nkernel/virtio_blk.ko.gz:\n").unwrap();
    fs::write(modules.join("kernel/virtio_mmio.ko"), "mmio").unwrap();
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    packed.write_all(b"blk").unwrap();
    fs::write(modules.join("kernel/virtio_blk.ko.gz"), packed.finish().unwrap()).unwrap();
    let kernel = Kernel { file: PathBuf::new(), release: "6.1".to_owned(), modules: Some(modules) };
    let (first, second) = (temporary.path().join("1"), temporary.path().join("2"));
    let absent = make(&first, &program(), &kernel, &description()).unwrap();
    assert!(absent.contains(&"virtio_net"));
    let found = read_back(&first);
    assert_eq!(found["init"], (0o100_755, program()));
    let list = String::from_utf8(found["mashines/modules"].1.clone()).unwrap();
    assert_eq!(list, "/lib/modules/6.1/kernel/virtio_mmio.ko\n/lib/modules/6.1/kernel/virtio_blk.ko\n");
    for (path, content) in list.lines().zip(["mmio", "blk"]) {
        assert_eq!(found[path.trim_start_matches('/')].1, content.as_bytes());
    }
    assert_eq!(found["dev/console"].0, 0o020_600);
    assert_eq!(found["lib/modules/6.1/kernel"].0, 0o040_755);
    let told: Description = serde_json::from_slice(&found["mashines/image.json"].1).unwrap();
    assert_eq!(told, description());
    make(&second, &program(), &kernel, &description()).unwrap();
    assert_eq!(fs::read(first).unwrap(), fs::read(second).unwrap());
}

#[test]
fn what_cannot_be_init_is_refused() {
    let temporary = tempfile::tempdir().unwrap();
    let path = temporary.path().join("agent");
    assert!(matches!(agent(&path), Err(InitrdError::AgentMissing { .. })));
    fs::write(&path, "#!/bin/sh\n").unwrap();
    assert!(matches!(agent(&path), Err(InitrdError::Agent { .. })));
    fs::write(&path, program()).unwrap();
    assert_eq!(agent(&path).unwrap(), program());
}
