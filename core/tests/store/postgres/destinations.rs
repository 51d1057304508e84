//! Destinations beside open transactions.

use pillarbox_core::{Admin, Start};

use super::{Db, names, run, write};
use crate::suite::{acquire, destinations::destination};

/// Its position is drawn before the destination is added, and it commits after: to a cursor that began at the highest
/// position it would be nothing new.
#[tokio::test]
async fn what_commits_after_now_is_new_whatever_its_position() {
    let Some((db, database)) = Db::migrated().await else {
        return;
    };
    let (mut early, mut late, mut other) = (db.raw().await, db.raw().await, db.raw().await);
    write(&mut other, "before").await;
    run(&mut early, "BEGIN").await;
    write(&mut early, "early").await;
    // The last one to have completed got its id first: PostgreSQL's own snapshot ends before the id of `late`, whose
    // position lies below what is visible.
    run(&mut other, "BEGIN; SELECT pg_current_xact_id()").await;
    run(&mut late, "BEGIN").await;
    write(&mut late, "late").await;
    write(&mut other, "before too").await;
    run(&mut other, "COMMIT").await;
    let admin = Admin::new(&database, "ada");
    admin.add_destination("next", Start::Now).await.unwrap();
    run(&mut late, "COMMIT").await;
    write(&mut other, "after").await;
    let store = &**database.store();
    let acquired = acquire(store, &destination("next")).await;
    let (read, end) = names(store, acquired.progress, 10).await;
    assert_eq!(read, ["late", "after"]);
    run(&mut early, "COMMIT").await;
    assert_eq!(names(store, end, 10).await.0, ["early"]);
}

/// What was open when a replay was started is the destination's own to send, or the replay's: no replay waits for it.
#[tokio::test]
async fn a_replay_ends_where_the_log_did() {
    let Some((db, database)) = Db::migrated().await else {
        return;
    };
    let (mut open, mut other) = (db.raw().await, db.raw().await);
    write(&mut other, "one").await;
    run(&mut open, "BEGIN").await;
    write(&mut open, "open").await;
    write(&mut other, "two").await;
    let admin = Admin::new(&database, "ada");
    let request = pillarbox_core::admin::ReplayRequest::new("r", "main");
    admin.start_replay(&request, "test").await.unwrap();
    let store = &**database.store();
    let progress = acquire(store, &destination("replay:r")).await.progress;
    let upto = progress.upto.clone().expect("it has an end");
    run(&mut open, "COMMIT").await;
    write(&mut other, "three").await;
    let slice = store.read(0, &progress, 10).await.unwrap();
    let found: Vec<_> = slice.events.iter().map(|e| e.position).collect();
    assert_eq!(found, [1, 3]);
    let end = slice.end.unwrap();
    assert_eq!((end.seen, end.upto), (upto, None));
}
