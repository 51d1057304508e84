-- Version 6: owners that died, and what they had alone under way.

CREATE TABLE IF NOT EXISTS {p}suspicion (
    lease      TEXT NOT NULL PRIMARY KEY,
    deaths     INTEGER NOT NULL,
    source     TEXT,
    id         TEXT,
    changed_at INTEGER NOT NULL DEFAULT ({now})
) WITHOUT ROWID;
