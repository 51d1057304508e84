//! Pauses as they are kept, seen and removed.

use std::time::{Duration, SystemTime};

use pillarbox_core::{
    Admin, Kind,
    admin::{Expiry, Side, Target},
    lease::LeaseKey,
};

use super::{Bench, GROUP, acquire, migrated, pump};

const HOUR: Duration = Duration::from_secs(3_600);

pub(crate) async fn a_pause_is_kept_until_it_is_resumed_or_over(bench: &dyn Bench) {
    let database = migrated(bench).await;
    let (store, admin) = (database.store().clone(), Admin::new(&database, "ada"));
    acquire(&*store, &pump()).await;
    let whole = Target::destination("main");
    let targets = [
        whole.clone(),
        whole.clone().topic("shop.events"),
        // A key that is empty is a key.
        whole.clone().key("shop.events", ""),
        whole.clone().key("shop.events", "k"),
        Target::group(GROUP),
        Target::group(GROUP).key("shop.events", "k"),
    ];
    for target in &targets {
        let pause = admin.pause(target, HOUR, "  a test ").await.unwrap();
        assert_eq!(
            (&pause.target, &*pause.reason, &*pause.operator),
            (target, "a test", "ada")
        );
        let left = pause.until.duration_since(SystemTime::now()).unwrap();
        assert!(left > HOUR - Duration::from_secs(60) && left <= HOUR + Duration::from_secs(60));
    }
    assert_eq!(admin.pauses().await.unwrap().len(), targets.len());
    let of = |side, scope| {
        let store = store.clone();
        async move { store.pauses(Some((side, scope))).await.unwrap().len() }
    };
    assert_eq!(of(Side::Relay, "main").await, 4);
    assert_eq!(of(Side::Relay, "other").await, 0);
    assert_eq!(of(Side::Consumer, GROUP).await, 2);

    let bob = Admin::new(&database, "bob");
    let again = bob.pause(&whole, 2 * HOUR, "longer").await.unwrap();
    assert_eq!(
        (&*again.reason, &*again.operator),
        ("longer", "bob"),
        "the newer one counts"
    );
    assert_eq!(admin.pauses().await.unwrap().len(), targets.len());
    assert_eq!(admin.resume(&whole, "done").await.unwrap(), again);
    let missing = admin.resume(&whole, "again").await.unwrap_err();
    assert_eq!(missing.kind(), Kind::NotFound, "{missing}");

    let short = Duration::from_millis(300);
    let key = whole.clone().key("shop.events", "k");
    let soon = admin.pause(&key, short, "for a moment").await.unwrap();
    let began = std::time::Instant::now();
    while admin.pauses().await.unwrap().contains(&soon) {
        assert!(began.elapsed() < Duration::from_secs(20), "it never ends");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let over = admin.resume(&key, "too late").await.unwrap_err();
    assert_eq!(over.kind(), Kind::NotFound, "{over}");

    admin.pause(&key, short, "for a moment").await.unwrap();
    tokio::time::sleep(short * 2).await;
    let cleaner = LeaseKey::Duty {
        kind: "cleaner",
        scope: "log".to_owned(),
        shard: 0,
    };
    let lease = acquire(&*store, &cleaner).await.lease;
    let removed = async |side| store.forget_pauses(&lease, side).await.unwrap();
    assert_eq!(removed(Side::Consumer).await, 0);
    assert_eq!(removed(Side::Relay).await, 1);
    assert_eq!(removed(Side::Relay).await, 0);
    assert_eq!(admin.pauses().await.unwrap().len(), targets.len() - 2);
}

pub(crate) async fn an_expiry_lies_within_a_week_by_the_databases_clock(bench: &dyn Bench) {
    let database = migrated(bench).await;
    let admin = Admin::new(&database, "ada");
    let main = Target::destination("main");
    let now = SystemTime::now();
    let refused = [
        Expiry::In(Duration::ZERO),
        Expiry::In(HOUR * 24 * 7 + Duration::from_millis(1)),
        Expiry::In(Duration::MAX),
        Expiry::At(now - HOUR),
        Expiry::At(now + HOUR * 24 * 7 + HOUR),
        Expiry::At(now + HOUR * 24 * 3_650),
        Expiry::At(SystemTime::UNIX_EPOCH),
    ];
    for expiry in refused {
        let error = admin.pause(&main, expiry, "a test").await.unwrap_err();
        assert_eq!(error.kind(), Kind::Invalid, "{expiry:?}: {error}");
        assert!(error.to_string().contains("7 days"), "{error}");
    }
    assert_eq!(admin.pauses().await.unwrap(), []);
    for expiry in [
        Expiry::default(),
        Expiry::At(now + HOUR),
        Expiry::At(now + HOUR * 24 * 7 - HOUR),
    ] {
        admin.pause(&main, expiry, "a test").await.unwrap();
    }
    for (target, why, says) in [
        (main.clone(), " ", "reason is empty"),
        (main.clone(), "two\nlines", "control characters"),
        (main.clone(), &*"x".repeat(1_001), "1000 at most"),
        (Target::group("g").topic("t"), "w", "a group is paused"),
        (main.clone().topic(""), "w", "empty"),
        (main.clone().key("t", "a\0b"), "w", "NUL"),
        (main.clone().key("t", "k".repeat(1_025)), "w", "1024 bytes"),
    ] {
        let error = admin.pause(&target, HOUR, why).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Invalid, "{target}: {error}");
        assert!(error.to_string().contains(says), "{error}");
    }
    let keyless = Target {
        key: Some("k".to_owned()),
        ..main
    };
    let error = admin.pause(&keyless, HOUR, "a test").await.unwrap_err();
    assert!(error.to_string().contains("name the topic"), "{error}");
}

pub(crate) async fn what_has_run_is_known_by_name(bench: &dyn Bench) {
    let database = migrated(bench).await;
    let admin = Admin::new(&database, "ada");
    for (target, known) in [
        (Target::destination("mian"), r#"["main"]"#),
        (Target::group("billing"), "[]"),
    ] {
        let error = admin.pause(&target, HOUR, "a test").await.unwrap_err();
        assert_eq!(error.kind(), Kind::NotFound, "{error}");
        assert!(error.to_string().contains(known), "{error}");
    }
    acquire(&**database.store(), &pump()).await;
    admin
        .pause(&Target::group(GROUP), HOUR, "a test")
        .await
        .unwrap();
}
