-- {p} is the prefix, {now} the clock: whole microseconds since 1970 with the resolution of a millisecond, written so
-- that any SQLite since 3.24 can evaluate it in the defaults of a plain INSERT.

CREATE TABLE IF NOT EXISTS {p}installation (
    one            INTEGER PRIMARY KEY CHECK (one = 1),
    version        INTEGER NOT NULL,
    oldest_program INTEGER NOT NULL,
    partitions     INTEGER NOT NULL
);

-- AUTOINCREMENT: without it the highest position comes again after a DELETE, below every cursor.
CREATE TABLE IF NOT EXISTS {p}outbox (
    position     INTEGER PRIMARY KEY AUTOINCREMENT,
    topic        TEXT NOT NULL,
    type         TEXT NOT NULL,
    key          TEXT,
    payload      BLOB,
    content_type TEXT,
    headers      TEXT,
    -- Refused for now: a row that were sent early would be worse.
    deliver_at   INTEGER CONSTRAINT deliver_at_is_not_supported_yet CHECK (deliver_at IS NULL),
    id           TEXT NOT NULL DEFAULT (lower(hex(randomblob(4)) || '-' || hex(randomblob(2)) || '-4' ||
                     substr(hex(randomblob(2)), 2) || '-' || substr('89ab', 1 + (random() & 3), 1) ||
                     substr(hex(randomblob(2)), 2) || '-' || hex(randomblob(6)))),
    version      INTEGER NOT NULL DEFAULT 1,
    attributes   TEXT,
    created_at   INTEGER NOT NULL DEFAULT ({now})
);

CREATE TABLE IF NOT EXISTS {p}cursor (
    destination TEXT NOT NULL,
    partition   INTEGER NOT NULL,
    last        INTEGER NOT NULL DEFAULT 0,
    owner       TEXT,
    epoch       INTEGER NOT NULL DEFAULT 0,
    expires_at  INTEGER NOT NULL DEFAULT 0,
    flushes     INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (destination, partition)
) WITHOUT ROWID;

CREATE TABLE IF NOT EXISTS {p}source_cursor (
    grp        TEXT NOT NULL,
    transport  TEXT NOT NULL,
    cluster    TEXT NOT NULL,
    name       TEXT NOT NULL,
    partition  INTEGER NOT NULL,
    identity   TEXT NOT NULL,
    position   INTEGER,
    owner      TEXT,
    epoch      INTEGER NOT NULL DEFAULT 0,
    expires_at INTEGER NOT NULL DEFAULT 0,
    flushes    INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (grp, transport, cluster, name, partition)
) WITHOUT ROWID;

CREATE TABLE IF NOT EXISTS {p}lease (
    kind       TEXT NOT NULL,
    scope      TEXT NOT NULL,
    shard      INTEGER NOT NULL,
    owner      TEXT,
    epoch      INTEGER NOT NULL DEFAULT 0,
    expires_at INTEGER NOT NULL DEFAULT 0,
    flushes    INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (kind, scope, shard)
) WITHOUT ROWID;

CREATE TABLE IF NOT EXISTS {p}deferred (
    seq           INTEGER PRIMARY KEY AUTOINCREMENT,
    side          TEXT NOT NULL,
    scope         TEXT NOT NULL,
    source        TEXT NOT NULL,
    id            TEXT NOT NULL,
    shard         INTEGER NOT NULL,
    position      INTEGER NOT NULL,
    topic         TEXT NOT NULL,
    type          TEXT NOT NULL,
    key           TEXT,
    payload       BLOB,
    headers       TEXT NOT NULL,
    attributes    TEXT NOT NULL,
    time          INTEGER NOT NULL,
    attempts      INTEGER NOT NULL,
    reason        TEXT,
    first_failure INTEGER,
    last_failure  INTEGER,
    due           INTEGER NOT NULL,
    UNIQUE (side, scope, source, id)
);
CREATE INDEX IF NOT EXISTS {p}deferred_line ON {p}deferred (side, scope, topic, key, position, seq);
CREATE INDEX IF NOT EXISTS {p}deferred_due ON {p}deferred (side, scope, shard, due, seq);

CREATE TABLE IF NOT EXISTS {p}dead_letter (
    seq           INTEGER PRIMARY KEY AUTOINCREMENT,
    side          TEXT NOT NULL,
    scope         TEXT NOT NULL,
    source        TEXT NOT NULL,
    id            TEXT NOT NULL,
    shard         INTEGER NOT NULL,
    position      INTEGER NOT NULL,
    topic         TEXT NOT NULL,
    type          TEXT NOT NULL,
    key           TEXT,
    payload       BLOB,
    headers       TEXT NOT NULL,
    attributes    TEXT NOT NULL,
    time          INTEGER NOT NULL,
    attempts      INTEGER NOT NULL,
    reason        TEXT NOT NULL,
    first_failure INTEGER NOT NULL,
    last_failure  INTEGER NOT NULL,
    maybe_sent    INTEGER NOT NULL,
    copied_at     INTEGER,
    UNIQUE (side, scope, source, id)
);
CREATE INDEX IF NOT EXISTS {p}dead_letter_uncopied ON {p}dead_letter (scope, seq)
    WHERE side = 'consumer' AND copied_at IS NULL;

-- The slot is a function of the event, never of its arrival; here it only serves forgetting, for one table can afford
-- the stronger key without it.
CREATE TABLE IF NOT EXISTS {p}inbox (
    grp        TEXT NOT NULL,
    source     TEXT NOT NULL,
    id         TEXT NOT NULL,
    slot       INTEGER NOT NULL,
    dead       INTEGER NOT NULL DEFAULT 0,
    arrived    INTEGER NOT NULL DEFAULT ({now}),
    PRIMARY KEY (grp, source, id)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS {p}inbox_arrived ON {p}inbox (arrived);
