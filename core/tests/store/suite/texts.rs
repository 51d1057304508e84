//! What goes in comes out, byte for byte.

use std::time::{Duration, SystemTime};

use pillarbox_core::transport::Message;

use super::{
    Bench, GROUP, acquire, deferral, drain, enqueue, letter, line_id, message, migrated, pump,
    relay,
};

const ODD: [&str; 8] = [
    "plain",
    "Zoë — 日本語 🦀 e\u{301}",
    "\u{202e}evil\u{200b}\u{feff}",
    "quote ' double \" back \\ dollar $1 ?1 {p} {now}",
    "line\nbreak\ttab\r\u{1b}[31m\u{7f}\u{1}",
    "<script>alert(1)</script>%s%n;--",
    "{\"json\": [1, null]}",
    " leading and trailing ",
];

/// Names and payloads of all kinds, as the log's limits allow them.
fn plain_messages() -> Vec<Message> {
    let payloads: [Option<Vec<u8>>; 6] = [
        None,
        Some(Vec::new()),
        Some(b"{}".to_vec()),
        Some((0..=255).collect()),
        Some(vec![0; 3]),
        Some((0..900 * 1024).map(|n| (n % 251) as u8).collect()),
    ];
    let keys = [
        None,
        Some(""),
        Some("k"),
        Some("Zoë 日本語"),
        Some(" "),
        Some("'"),
    ];
    let pairs = payloads.into_iter().zip(keys);
    pairs
        .map(|(payload, key)| Message {
            payload: payload.map(Into::into),
            ..message(key)
                .with_attribute("datacontenttype", "application/octet-stream")
                .with_attribute("dataversion", "7")
                .with_header("note", "Zoë 日本語 ' \" \\")
        })
        .collect()
}

/// What the waiting room must keep too: a foreign event's texts are not checked by our limits.
fn odd_messages() -> Vec<Message> {
    let odd = ODD.iter().map(|text| {
        let mut m = message(Some(text)).with_header(*text, *text);
        m.id = format!("{} {text}", m.id);
        m.topic = (*text).to_owned();
        m.kind = (*text).to_owned();
        m.with_attribute("source", *text).with_attribute("x", *text)
    });
    let mut all = plain_messages();
    all.extend(odd);
    all
}

/// Databases keep microseconds.
#[track_caller]
fn same(found: &Message, sent: &Message) {
    let apart = |a: SystemTime, b: SystemTime| match a.duration_since(b) {
        Ok(d) => d,
        Err(e) => e.duration(),
    };
    assert!(apart(found.time, sent.time) < Duration::from_micros(1));
    let found = Message {
        time: sent.time,
        ..found.clone()
    };
    assert!(found == *sent, "{found:?} is not {sent:?}");
}

pub(crate) async fn the_log_keeps_every_text_and_payload(bench: &dyn Bench) {
    let database = migrated(bench).await;
    let sent = plain_messages();
    enqueue(&database, &sent).await;
    let store = database.store();
    let start = acquire(&**store, &relay()).await.progress;
    let (read, _) = drain(&**store, start, 3).await;
    assert_eq!(read.len(), sent.len());
    for (found, sent) in read.iter().zip(&sent) {
        assert_eq!(found.defect, None);
        // The log's time is the database's.
        let sent = Message {
            time: found.message.time,
            ..sent.clone()
        };
        same(&found.message, &sent);
    }
}

pub(crate) async fn the_waiting_room_keeps_every_text_and_payload(bench: &dyn Bench) {
    let database = migrated(bench).await;
    let store = database.store();
    for key in [relay(), pump()] {
        let lease = acquire(&**store, &key).await.lease;
        for sent in odd_messages() {
            let mut event = deferral(&sent);
            event.reason = Some(ODD.join(" "));
            event.attempts = 1;
            store.defer(&lease, &[event]).await.unwrap();
            let key = pillarbox_core::Key::of(&sent);
            let line = store.line(&lease, key.as_ref(), &line_id(&sent), 50).await;
            let line = line.unwrap();
            let found = line.iter().find(|d| d.message.id == sent.id);
            same(&found.expect("it waits").message, &sent);
        }
    }
    let mut unit = store.begin(GROUP, super::term(), true).await.unwrap();
    let messages = odd_messages();
    let keyed: Vec<_> = messages.iter().filter(|m| m.key.is_some()).collect();
    let blocked = unit.blocked(&keyed).await.unwrap();
    assert!(blocked.iter().all(|b| *b), "{blocked:?}");
    unit.rollback().await.unwrap();
}

pub(crate) async fn dead_letters_keep_every_text_and_payload(bench: &dyn Bench) {
    let database = migrated(bench).await;
    let store = database.store();
    let lease = acquire(&**store, &pump()).await.lease;
    let sent = odd_messages();
    for m in &sent {
        let mut event = letter(m);
        event.reason = ODD.join(" ");
        store.bury(&lease, &[event]).await.unwrap();
    }
    let found = store.uncopied(GROUP, 100).await.unwrap();
    assert_eq!(found.len(), sent.len());
    for (found, sent) in found.iter().zip(&sent) {
        same(&found.message, sent);
        assert_eq!(found.reason, ODD.join(" "));
    }
}

pub(crate) async fn a_long_reason_is_cut(bench: &dyn Bench) {
    let database = migrated(bench).await;
    let store = database.store();
    let lease = acquire(&**store, &pump()).await.lease;
    let m = message(None);
    let mut event = letter(&m);
    event.reason = "x".to_owned() + &"é".repeat(50_000);
    store.bury(&lease, &[event]).await.unwrap();
    let found = store.uncopied(GROUP, 1).await.unwrap();
    let reason = &found[0].reason;
    assert!(reason.starts_with("xéé"));
    assert!((1_000..10_000).contains(&reason.len()), "{}", reason.len());
}

/// A plain INSERT can write any number; the library's own check refuses these.
pub(crate) async fn a_version_below_zero_is_a_defect(bench: &dyn Bench) {
    let database = migrated(bench).await;
    bench
        .execute("INSERT INTO {outbox} (topic, type, version) VALUES ('t', 'a', -1), ('t', 'b', 0)")
        .await;
    let (events, _) = drain(&**database.store(), Default::default(), 10).await;
    let [bad, good] = &events[..] else {
        panic!("{events:?}")
    };
    let defect = bad.defect.as_deref().unwrap_or_default();
    assert!(defect.contains("the version is -1"), "{defect}");
    assert_eq!(
        (good.defect.as_deref(), good.message.version()),
        (None, Some(0))
    );
}
