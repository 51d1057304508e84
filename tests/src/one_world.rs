//! The cases that only one of the two worlds can have, each with its reason. Everything else runs in both.

use crate::Kind::{self, Embedded, Servers};

const ONE_WRITER: &str = "one SQLite writer blocks the others: no transaction commits later than one that began after it";
const NO_WIRE: &str = "memory has no wire: no stranger can send it a message without an envelope";
const NO_BROKER: &str = "memory has no server that could be away, full, frozen or restarted";
const NO_SERVER: &str =
    "SQLite and memory have no server that could be stopped, cut off or restarted, and no password";
const NO_POWER_CUT: &str =
    "what SQLite has not flushed only a power cut loses, and a test cannot make one";
const NO_FUNCTIONS: &str = "SQLite has no functions in a schema; a plain INSERT is the way there";
const ONE_PARTITION: &str = "on SQLite the log has one partition, which cannot be shared";
const NO_SETTING: &str = "SQLite has no such setting";

/// (test, the world that has it, why the other cannot).
pub const CASES: &[(&str, Kind, &str)] = &[
    (
        "a_transaction_that_commits_late_is_delivered",
        Servers,
        ONE_WRITER,
    ),
    (
        "messages_without_a_trustworthy_envelope_are_dead_letters_with_the_reason",
        Servers,
        NO_WIRE,
    ),
    (
        "a_type_without_handler_is_skipped_and_counted",
        Servers,
        "memory gives a group only the types that it has handlers for",
    ),
    (
        "a_move_between_brokers_loses_nothing",
        Servers,
        "a process has one memory transport, and so no second broker to move to",
    ),
    (
        "a_replay_ends_though_events_are_refused",
        Embedded,
        "the transport is wrapped, and what it refuses is the same on any",
    ),
    ("a_full_queue_costs_nothing_but_time", Servers, NO_BROKER),
    (
        "a_missing_exchange_costs_nothing_but_time",
        Servers,
        NO_BROKER,
    ),
    (
        "a_broker_that_is_away_at_the_start_is_waited_for",
        Servers,
        NO_BROKER,
    ),
    (
        "a_group_that_does_not_read_costs_nothing_but_time",
        Embedded,
        "a queue takes events for a group that does not read",
    ),
    (
        "sqlstates_that_are_nobodys_fault_burn_no_attempt",
        Servers,
        "SQLite raises no such states; its own, busy, has a test of its own",
    ),
    (
        "a_database_that_is_busy_burns_no_attempt",
        Embedded,
        "PostgreSQL's writers wait for each other row by row",
    ),
    (
        "the_hosts_isolation_level_is_not_the_engines",
        Servers,
        NO_SETTING,
    ),
    (
        "memory_says_ok_once_every_group_has_committed",
        Embedded,
        "a broker's Ok says that its queues have the event, not its groups",
    ),
    (
        "the_schemas_functions_enqueue_for_any_language",
        Servers,
        NO_FUNCTIONS,
    ),
    (
        "statements_held_back_past_the_lease_change_nothing",
        Servers,
        NO_SERVER,
    ),
    (
        "broker_connections_that_break_in_mid_window",
        Servers,
        NO_SERVER,
    ),
    ("a_broker_that_falls_silent", Servers, NO_SERVER),
    (
        "database_connections_that_break_in_mid_work",
        Servers,
        NO_SERVER,
    ),
    ("databases_that_fall_silent", Servers, NO_SERVER),
    (
        "a_broker_that_restarts_costs_nothing_but_time",
        Servers,
        NO_SERVER,
    ),
    (
        "a_database_that_restarts_costs_nothing_but_time",
        Servers,
        NO_SERVER,
    ),
    (
        "what_a_crashed_database_lost_was_not_sent",
        Servers,
        NO_POWER_CUT,
    ),
    (
        "what_was_acknowledged_survives_a_crash",
        Servers,
        NO_POWER_CUT,
    ),
    (
        "who_cannot_see_the_pauses_yet_sends_and_reads_nothing",
        Servers,
        "nothing can keep a reader of SQLite from reading",
    ),
    (
        "an_outage_of_the_broker_is_quiet_and_soon_over",
        Servers,
        NO_SERVER,
    ),
    (
        "a_read_only_database_costs_nothing_but_time",
        Servers,
        "SQLite has no failover after which it refuses writes",
    ),
    (
        "a_commit_whose_answer_is_lost_changes_nothing",
        Servers,
        NO_SERVER,
    ),
    ("no_storm_of_faults_breaks_a_promise", Servers, NO_SERVER),
    (
        "relays_that_come_and_go_share_the_partitions_out",
        Servers,
        ONE_PARTITION,
    ),
    ("more_partitions_keep_the_order", Servers, ONE_PARTITION),
    (
        "processes_share_the_partitions_and_take_over_a_killed_ones",
        Servers,
        ONE_PARTITION,
    ),
    (
        "one_that_ends_the_connection_is_found_among_a_thousand",
        Servers,
        NO_SERVER,
    ),
    (
        "ten_that_end_the_connection_cost_their_neighbours_nothing",
        Servers,
        NO_SERVER,
    ),
    ("a_wrong_password_is_told_and_not_shown", Servers, NO_SERVER),
    (
        "memory_is_held_by_one_at_a_time",
        Embedded,
        "a broker is shared by any number of processes",
    ),
];

/// Fails for a test that runs in one world without standing in the table.
///
/// # Panics
/// Then.
pub fn assert_listed(test: &str, world: Kind) {
    let listed = CASES
        .iter()
        .any(|(name, kind, _)| *name == test && *kind == world);
    assert!(
        listed,
        "{test} runs in one world: give its reason in one_world::CASES"
    );
}
