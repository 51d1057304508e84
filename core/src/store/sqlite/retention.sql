-- Version 2: retention. {p} is the prefix.

CREATE INDEX IF NOT EXISTS {p}inbox_source ON {p}inbox (grp, source, arrived);
CREATE INDEX IF NOT EXISTS {p}dead_letter_order ON {p}dead_letter (side, scope, seq);

-- How long each source of a group has been running, in microseconds of traffic up to an arrival: the inbox forgets by that,
-- not by the calendar. A gap between arrivals counts 60 s at most.
CREATE TABLE IF NOT EXISTS {p}inbox_clock (
    grp     TEXT NOT NULL,
    source  TEXT NOT NULL,
    at      INTEGER NOT NULL,
    running INTEGER NOT NULL,
    PRIMARY KEY (grp, source, at)
) WITHOUT ROWID;
