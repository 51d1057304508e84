//! The promises of a store, as bodies that run on each database.
//!
//! A database joins by implementing [`Bench`] and naming it in [`exercise!`].
//! What is not here: a commit that becomes visible after a later position did. Only PostgreSQL has that (its own tests
//! show it); SQLite's writers are serial, so positions become visible in their order.

use std::time::Duration;

use async_trait::async_trait;
use pillarbox_core::{
    Connection, Database, Outbox, Pool,
    cursor::Progress,
    error::Kind,
    failure::{DeadLetter, Deferral, Hold, LineId},
    lease::{Acquired, Lease, LeaseKey, LeaseTerm},
    migrate_with,
    store::{Logged, Store, Unit},
    transport::{Message, Source},
};
use uuid::Uuid;

pub(crate) mod backpressure;
pub(crate) mod consumer;
pub(crate) mod deferred;
pub(crate) mod destinations;
pub(crate) mod drops;
pub(crate) mod fences;
pub(crate) mod forgetting;
pub(crate) mod inbox;
pub(crate) mod leases;
pub(crate) mod letters;
pub(crate) mod log;
pub(crate) mod pauses;
pub(crate) mod retention;
pub(crate) mod schedule;
pub(crate) mod schema;
pub(crate) mod status;
pub(crate) mod texts;

/// An empty database of one test's own, and an independent raw client on it.
#[async_trait]
pub(crate) trait Bench: Send + Sync {
    /// The database through a pool, and so a store, of its own on each call.
    async fn database(&self) -> Database;
    /// Runs a statement. `{outbox}`, `{cursor}`, `{deferred}`, `{dead_letter}`, `{inbox}` and `{inbox_clock}` stand for the
    /// tables.
    async fn execute(&self, sql: &str);
    /// One number.
    async fn number(&self, sql: &str) -> i64;
    /// Makes the schema name this program too old.
    async fn outdate(&self);
    /// Moves the expiry of a relay's or source's lease to so many seconds from now.
    async fn expire(&self, key: &LeaseKey, seconds: i64);
    /// How many transactions are open on the database.
    async fn open_transactions(&self) -> i64;
    /// Moves the log's events to where they would lie had they been written an hour ago.
    async fn age_log(&self);
    /// Lets the log's ring turn in four seconds, where there is one.
    async fn short_slots(&self);
    /// What the log takes on the disk.
    async fn log_bytes(&self) -> i64;
    /// Writes so many events, some at a time, and answers how many; fails if a lock is waited for longer than 50 ms, where
    /// writers can wait beside each other.
    async fn write_impatiently(&self, events: usize) -> usize;
    /// Moves the log's events so many seconds into the past, without moving them to other slots.
    async fn grow_old(&self, seconds: i64);
    /// Moves everything that has arrived so many seconds into the past.
    async fn pass(&self, seconds: i64);
}

/// A migrated database with one log partition.
pub(crate) async fn migrated(bench: &dyn Bench) -> Database {
    let database = bench.database().await;
    migrate_with(&database, 1).await.unwrap();
    bench.execute("CREATE TABLE effects (n bigint)").await;
    database
}

pub(crate) fn relay() -> LeaseKey {
    LeaseKey::Relay {
        destination: "main".to_owned(),
        partition: 0,
    }
}

pub(crate) fn source() -> Source {
    Source {
        transport: "memory",
        cluster: "c".to_owned(),
        topic: "shop.events".to_owned(),
        name: "shop.events.orders".to_owned(),
        partition: 0,
        identity: "first".to_owned(),
        replayable: true,
    }
}

pub(crate) const GROUP: &str = "orders";

pub(crate) fn group() -> LeaseKey {
    LeaseKey::Source {
        group: GROUP.to_owned(),
        source: source(),
    }
}

pub(crate) fn pump() -> LeaseKey {
    LeaseKey::Duty {
        kind: "pump",
        scope: GROUP.to_owned(),
        shard: 0,
    }
}

/// Long enough that no lease expires by itself.
pub(crate) fn term() -> LeaseTerm {
    LeaseTerm::new(Duration::from_secs(60))
}

pub(crate) async fn acquire(store: &dyn Store, key: &LeaseKey) -> Acquired {
    store
        .acquire(key, term())
        .await
        .unwrap()
        .expect("the lease is free")
}

/// A message whose id is a UUID.
pub(crate) fn message(key: Option<&str>) -> Message {
    let id = Uuid::now_v7().to_string();
    let mut m = Message::new(id, "shop.events", "shop.order.placed", "{}");
    m.key = key.map(Into::into);
    m.with_attribute("source", "shop")
}

pub(crate) fn line_id(m: &Message) -> LineId {
    (m.source().to_owned(), m.id.clone())
}

/// One that merely waits, due at once.
pub(crate) fn deferral(message: &Message) -> Deferral {
    Deferral {
        message: message.clone(),
        position: 0,
        attempts: 0,
        reason: None,
        delay: Duration::ZERO,
        maybe_sent: false,
        hold: Hold::None,
    }
}

pub(crate) fn letter(message: &Message) -> DeadLetter {
    DeadLetter {
        message: message.clone(),
        position: 7,
        attempts: 3,
        reason: "broken".to_owned(),
        maybe_sent: true,
    }
}

/// Enqueues in one transaction.
pub(crate) async fn enqueue(database: &Database, messages: &[Message]) {
    let outbox = Outbox::new(database);
    match database.pool().expect("a real database") {
        #[cfg(feature = "postgres")]
        Pool::Postgres(pool) => {
            let mut tx = pool.begin().await.unwrap();
            for m in messages {
                outbox.enqueue_message(&mut tx, m.clone()).await.unwrap();
            }
            tx.commit().await.unwrap();
        }
        #[cfg(feature = "sqlite")]
        Pool::Sqlite(pool) => {
            let mut tx = pool.begin().await.unwrap();
            for m in messages {
                outbox.enqueue_message(&mut tx, m.clone()).await.unwrap();
            }
            tx.commit().await.unwrap();
        }
    }
}

/// A handler's statement.
pub(crate) async fn handle(unit: &mut dyn Unit, sql: &'static str) -> sqlx::Result<()> {
    match unit.connection().expect("a real database") {
        #[cfg(feature = "postgres")]
        Connection::Postgres(c) => sqlx::raw_sql(sql).execute(c).await.map(drop),
        #[cfg(feature = "sqlite")]
        Connection::Sqlite(c) => sqlx::raw_sql(sql).execute(c).await.map(drop),
    }
}

pub(crate) const EFFECT: &str = "INSERT INTO effects (n) VALUES (1)";

pub(crate) async fn effects(bench: &dyn Bench) -> i64 {
    bench.number("SELECT count(*) FROM effects").await
}

/// Everything that the log shows after `from`, and where that ends.
pub(crate) async fn drain(
    store: &dyn Store,
    from: Progress,
    limit: u32,
) -> (Vec<Logged>, Progress) {
    let (mut all, mut at) = (Vec::new(), from);
    loop {
        let slice = store.read(0, &at, limit).await.unwrap();
        assert!(slice.events.len() <= limit as usize);
        let Some(end) = slice.end else {
            assert!(slice.events.is_empty());
            return (all, at);
        };
        assert!(!slice.events.is_empty(), "an empty read moves nothing");
        all.extend(slice.events);
        at = end;
    }
}

pub(crate) fn ids<'a>(events: impl IntoIterator<Item = &'a Logged>) -> Vec<&'a str> {
    events.into_iter().map(|e| e.message.id.as_str()).collect()
}

pub(crate) fn ids_of(messages: &[Message]) -> Vec<&str> {
    messages.iter().map(|m| m.id.as_str()).collect()
}

/// The lease as somebody would hold it after a failover that lost the last acquisition: the same epoch, another owner.
pub(crate) fn impostor(lease: &Lease) -> Lease {
    Lease {
        owner: Uuid::new_v4(),
        ..lease.clone()
    }
}

#[track_caller]
pub(crate) fn lost<T: std::fmt::Debug>(answer: pillarbox_core::Result<T>) {
    assert_eq!(
        answer.expect_err("the lease is lost").kind(),
        Kind::LeaseLost
    );
}

/// Makes a test of each case. `$open` is a future of `Option<impl Bench>`; none skips.
macro_rules! exercise {
    ($open:expr) => {
        $crate::suite::cases! { $open;
            schema::migrating_again_changes_nothing,
            schema::many_migrate_at_once,
            schema::main_stands_at_the_start_of_the_log,
            schema::a_database_without_tables_names_migrate,
            schema::a_schema_that_asks_for_a_newer_program_is_refused,
            schema::a_schema_of_another_name_is_apart,
            pauses::a_pause_is_kept_until_it_is_resumed_or_over,
            pauses::an_expiry_lies_within_a_week_by_the_databases_clock,
            pauses::what_has_run_is_known_by_name,
            leases::a_lease_has_one_owner,
            leases::a_lease_that_is_given_back_is_free,
            leases::a_lease_expires_and_is_taken_over,
            leases::a_renewed_lease_does_not_expire,
            leases::the_same_epoch_of_another_owner_is_lost,
            leases::a_clock_set_back_does_not_lock_a_lease,
            leases::many_compete_and_one_wins,
            leases::epochs_grow_for_ever,
            leases::whoever_lives_has_a_seat,
            leases::deaths_are_counted_until_there_is_progress,
            log::events_are_read_in_order,
            log::reading_goes_on_in_the_middle_of_a_slice,
            log::a_rolled_back_event_is_never_read,
            log::an_open_transaction_is_not_read,
            log::a_new_owner_goes_on_where_the_last_settled,
            log::a_new_destination_starts_at_the_start,
            log::flushing_needs_the_lease,
            log::a_plain_insert_is_read,
            log::a_wrong_row_is_a_defect_and_stops_nobody,
            fences::a_lost_lease_writes_nothing_at_the_relay,
            fences::a_lost_lease_writes_nothing_at_the_consumer,
            fences::a_unit_of_a_lost_lease_commits_nothing,
            fences::a_unit_renews_its_lease,
            deferred::deferring_twice_keeps_the_first,
            deferred::a_line_is_in_order_and_its_head_leads,
            deferred::lines_come_soonest_due_first,
            deferred::keyless_events_are_lines_of_their_own,
            deferred::the_empty_key_is_a_key,
            deferred::a_key_belongs_to_its_topic,
            deferred::sides_and_scopes_are_apart,
            deferred::done_leaves_the_line,
            deferred::again_stays_the_head,
            deferred::dead_becomes_a_dead_letter,
            deferred::burying_twice_keeps_the_first,
            deferred::a_copy_is_noted_once,
            inbox::a_second_arrival_is_remembered,
            inbox::an_undone_event_is_forgotten,
            inbox::the_dead_are_remembered,
            inbox::a_dead_head_is_remembered,
            inbox::a_dead_letter_put_back_is_applied_once,
            inbox::an_event_without_time_is_remembered,
            inbox::groups_and_sources_are_apart,
            inbox::a_line_blocks_its_key,
            inbox::the_probe_sees_the_units_own_writes,
            inbox::a_unit_rolls_back_whole,
            inbox::a_unit_that_is_dropped_rolls_back,
            inbox::a_failing_statement_spares_its_neighbours,
            inbox::a_handler_that_commits_is_found_out,
            letters::a_list_shows_what_its_filter_names,
            letters::a_letter_is_shown_whole_and_a_missing_one_is_named,
            letters::a_retry_moves_a_letter_once,
            letters::what_is_put_back_stands_first_in_its_line,
            letters::a_discarded_event_is_not_applied_if_it_comes_again,
            letters::a_command_for_many_keeps_its_bounds,
            letters::a_dry_run_counts_and_changes_nothing,
            letters::what_could_not_be_read_is_never_put_back,
            letters::nothing_is_put_back_under_an_open_transaction,
            schedule::a_schema_of_version_1_is_completed,
            schedule::a_time_travels_through_the_log,
            schedule::what_is_scheduled_stands_in_no_line_until_its_time,
            schedule::a_lost_lease_lets_nothing_fall_due,
            schedule::what_is_cancelled_before_its_time_never_enters_a_line,
            schedule::an_open_cancel_decides,
            schedule::a_parked_key_waits_for_an_operator,
            schedule::a_lost_answer_is_remembered,
            consumer::a_source_keeps_its_position,
            consumer::a_source_made_anew_is_read_from_its_start,
            drops::dropped_calls_do_no_harm,
            drops::a_dropped_write_still_comes_to_its_end,
            drops::dropped_units_do_no_harm,
            retention::what_is_settled_goes_and_positions_grow_on,
            retention::what_is_young_stays,
            retention::what_is_not_settled_stays,
            retention::every_destination_is_waited_for,
            retention::nothing_is_settled_for_want_of_a_cursor,
            retention::one_cleaner_works,
            retention::a_long_log_goes_step_by_step,
            retention::dead_letters_go_by_age_and_number,
            forgetting::a_dead_letter_waits_for_its_copy,
            forgetting::a_source_is_remembered_for_its_running_time,
            forgetting::a_stop_of_days_forgets_nothing,
            forgetting::a_silent_source_outlasts_those_that_run,
            forgetting::an_event_without_time_is_forgotten_too,
            forgetting::a_clock_set_back_forgets_nothing,
            forgetting::an_inbox_does_not_grow,
            retention::a_relay_cleans_beside_its_work,
            forgetting::a_consumer_cleans_beside_its_work,
            backpressure::the_backlog_is_what_is_not_settled,
            backpressure::an_outbox_refuses_beyond_what_it_was_told,
            retention::a_log_under_load_does_not_grow,
            destinations::each_begins_where_it_was_told,
            destinations::a_destination_is_added_once,
            destinations::a_list_tells_how_each_stands,
            destinations::a_removed_destination_leaves_its_loss,
            destinations::the_last_destination_stays,
            destinations::a_relay_serves_what_is_there_or_begins_it,
            destinations::an_abandoned_destination_is_removed_with_its_loss,
            destinations::main_is_never_abandoned,
            destinations::a_replay_says_what_it_would_send,
            status::owners_and_lag_are_what_leases_and_cursors_say,
            status::what_waits_and_was_given_up_is_counted_where_it_is,
            status::a_status_needs_a_schema_that_is_complete,
            texts::the_log_keeps_every_text_and_payload,
            texts::the_waiting_room_keeps_every_text_and_payload,
            texts::dead_letters_keep_every_text_and_payload,
            texts::a_long_reason_is_cut,
            texts::a_version_below_zero_is_a_defect,
        }
    };
}
pub(crate) use exercise;

macro_rules! cases {
    ($open:expr; $($module:ident::$case:ident,)*) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $case() {
                if let Some(bench) = $open.await {
                    $crate::suite::$module::$case(&bench).await;
                }
            }
        )*
    };
}
pub(crate) use cases;
