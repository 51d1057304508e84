-- Version 6: owners that died, and what they had alone under way.

CREATE TABLE IF NOT EXISTS @schema@.suspicion (
  lease      text PRIMARY KEY,
  deaths     integer NOT NULL,
  source     text,
  id         text,
  changed_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
COMMENT ON TABLE @schema@.suspicion IS 'Leases whose owners died without giving them back, until the next one makes progress: an event may end each process that handles it.';
COMMENT ON COLUMN @schema@.suspicion.deaths IS 'So many owners, one after the other.';
COMMENT ON COLUMN @schema@.suspicion.id IS 'With source: the one event that the last owner began, when it had nothing else under way.';
