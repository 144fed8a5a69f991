//! The store on a real file: what it keeps, what it drops, and what it refuses.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use controlplane::api::{Event, EventKind};
use controlplane::store::records::Meta;
use controlplane::store::{Batch, EVENTS_MAX, RedbStore, Store, StoreError, StoreOptions};
use redb::{Database, TableDefinition};

fn open(path: &std::path::Path) -> Result<RedbStore, StoreError> {
    RedbStore::open(path, StoreOptions::default())
}

fn event(id: u64) -> Event {
    let message = format!("event {id}");
    Event {
        id,
        at_unix_ms: id,
        kind: EventKind::HostOnline,
        machine: None,
        host: None,
        migration: None,
        message,
    }
}

#[test]
fn what_was_committed_is_there_after_reopening() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("control.redb");
    // A first start that was cut short leaves a draft, which the next one replaces.
    std::fs::write(path.with_extension("draft"), b"half a database").unwrap();
    let meta = Meta { generation: 3, event_id: 2, ..Meta::default() };
    let mut store = open(&path).unwrap();
    store
        .commit(&Batch { meta: Some(meta.clone()), events: vec![event(1), event(2)], ..Batch::default() })
        .unwrap();
    assert!(matches!(open(&path), Err(StoreError::Database(_))), "one process at a time");
    drop(store);
    let store = open(&path).unwrap();
    assert_eq!(store.load().unwrap().meta, meta);
    assert_eq!(store.events_after(1, 10).unwrap(), [event(2)]);
}

#[test]
fn only_the_newest_events_are_kept() {
    let directory = tempfile::tempdir().unwrap();
    let mut store = open(&directory.path().join("control.redb")).unwrap();
    let newest = EVENTS_MAX + 500;
    store.commit(&Batch { events: (1..=EVENTS_MAX).map(event).collect(), ..Batch::default() }).unwrap();
    store
        .commit(&Batch { events: (EVENTS_MAX + 1..=newest).map(event).collect(), ..Batch::default() })
        .unwrap();
    let kept = store.events_after(0, usize::MAX).unwrap();
    assert_eq!((kept.first().unwrap().id, kept.last().unwrap().id), (501, newest));
    assert_eq!(kept.len(), usize::try_from(EVENTS_MAX).unwrap());
    assert_eq!(store.events_after(newest - 1, 5).unwrap(), [event(newest)]);
    assert!(store.events_after(u64::MAX, 5).unwrap().is_empty());
}

#[test]
fn a_store_of_a_newer_release_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("control.redb");
    drop(open(&path).unwrap());
    let database = Database::open(&path).unwrap();
    let write = database.begin_write().unwrap();
    let meta: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("meta");
    let newer = br#"{"v":1,"value":2}"#.as_slice();
    write.open_table(meta).unwrap().insert("schema_version", newer).unwrap();
    write.commit().unwrap();
    drop(database);
    let error = open(&path).err().unwrap();
    assert!(matches!(error, StoreError::Newer { found: 2 }), "{error}");
}

#[test]
fn a_file_that_is_no_store_is_left_as_it_is() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("control.redb");
    std::fs::write(&path, b"somebody's thesis").unwrap();
    assert!(matches!(open(&path), Err(StoreError::Database(_))));
    assert_eq!(std::fs::read(&path).unwrap(), b"somebody's thesis");
}
