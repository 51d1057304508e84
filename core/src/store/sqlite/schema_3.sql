-- Version 3: events that are sent at a time of their own, keys that wait for an operator, and what may have been sent.

-- SQLite cannot take a CHECK away: the log is made anew, with its rows and its place in the count of positions.
CREATE TABLE {p}outbox_3 (
    position     INTEGER PRIMARY KEY AUTOINCREMENT,
    topic        TEXT NOT NULL,
    type         TEXT NOT NULL,
    key          TEXT,
    payload      BLOB,
    content_type TEXT,
    headers      TEXT,
    -- Microseconds since 1970: not to be sent before.
    deliver_at   INTEGER CHECK (deliver_at IS NULL OR typeof(deliver_at) = 'integer'),
    id           TEXT NOT NULL DEFAULT (lower(hex(randomblob(4)) || '-' || hex(randomblob(2)) || '-4' ||
                     substr(hex(randomblob(2)), 2) || '-' || substr('89ab', 1 + (random() & 3), 1) ||
                     substr(hex(randomblob(2)), 2) || '-' || hex(randomblob(6)))),
    version      INTEGER NOT NULL DEFAULT 1,
    attributes   TEXT,
    created_at   INTEGER NOT NULL DEFAULT ({now})
);
INSERT INTO {p}outbox_3 (position, topic, type, key, payload, content_type, headers, deliver_at, id, version, attributes, created_at)
    SELECT position, topic, type, key, payload, content_type, headers, deliver_at, id, version, attributes, created_at FROM {p}outbox;
DELETE FROM sqlite_sequence WHERE name = '{p}outbox_3';
INSERT INTO sqlite_sequence (name, seq) SELECT '{p}outbox_3', seq FROM sqlite_sequence WHERE name = '{p}outbox';
DROP TABLE {p}outbox;
ALTER TABLE {p}outbox_3 RENAME TO {p}outbox;

ALTER TABLE {p}deferred ADD COLUMN maybe_sent INTEGER NOT NULL DEFAULT 0;
ALTER TABLE {p}deferred ADD COLUMN parked INTEGER NOT NULL DEFAULT 0;
-- Waits for its time (due) and stands in no line until then.
ALTER TABLE {p}deferred ADD COLUMN scheduled INTEGER NOT NULL DEFAULT 0;
CREATE INDEX {p}deferred_scheduled ON {p}deferred (side, scope, shard, due, seq) WHERE scheduled;
CREATE INDEX {p}deferred_parked ON {p}deferred (side, scope, seq) WHERE parked;

CREATE TABLE {p}cancelled (
    id         TEXT NOT NULL PRIMARY KEY,
    deliver_at INTEGER NOT NULL,
    created_at INTEGER NOT NULL DEFAULT ({now})
) WITHOUT ROWID;
CREATE INDEX {p}cancelled_old ON {p}cancelled (deliver_at);
