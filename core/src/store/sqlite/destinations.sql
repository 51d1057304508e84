-- Version 5: destinations by name. {p} is the prefix.

-- What is said about each destination, and the record of those that were removed. unserved: microseconds without a relay of
-- its own, counted by the cleaner while it runs. replay: what is sent again, as JSON; NULL: no replay.
CREATE TABLE IF NOT EXISTS {p}destination (
    name         TEXT NOT NULL PRIMARY KEY,
    start        TEXT NOT NULL DEFAULT 'earliest' CHECK (start IN ('earliest', 'now', 'at')),
    since        INTEGER,
    replay       TEXT,
    created_at   INTEGER NOT NULL DEFAULT ({now}),
    looked_at    INTEGER,
    unserved     INTEGER NOT NULL DEFAULT 0,
    removed_at   INTEGER,
    removed_why  TEXT,
    unpublished  INTEGER NOT NULL DEFAULT 0,
    deferred     INTEGER NOT NULL DEFAULT 0,
    dead_letters INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;
INSERT INTO {p}destination (name) SELECT DISTINCT destination FROM {p}cursor WHERE true ON CONFLICT DO NOTHING;

-- The position at which a replay ends; NULL once it is there, and for those that never end.
ALTER TABLE {p}cursor ADD COLUMN upto INTEGER;

-- What retention has removed from the log.
ALTER TABLE {p}installation ADD COLUMN gone_position INTEGER NOT NULL DEFAULT 0;
ALTER TABLE {p}installation ADD COLUMN gone_time INTEGER;
