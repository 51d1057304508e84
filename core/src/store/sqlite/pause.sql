-- Version 4: what operators hold back for a while.

CREATE TABLE IF NOT EXISTS {p}pause (
    side     TEXT NOT NULL CHECK (side IN ('relay', 'consumer')),
    scope    TEXT NOT NULL,
    -- This topic alone; empty: all.
    topic    TEXT NOT NULL DEFAULT '',
    -- This key of the topic alone.
    keyed    INTEGER NOT NULL DEFAULT 0,
    key      TEXT NOT NULL DEFAULT '',
    begun_at INTEGER NOT NULL DEFAULT ({now}),
    -- When it ends by itself.
    ends_at  INTEGER NOT NULL,
    reason   TEXT NOT NULL,
    operator TEXT NOT NULL,
    PRIMARY KEY (side, scope, topic, keyed, key)
) WITHOUT ROWID;
