-- Version 3: events that are sent at a time of their own, keys that wait for an operator, and what may have been sent.

-- Takes the log for a moment. Rather than standing in the way of all writers behind a long transaction, it gives up and is
-- tried again.
SET LOCAL lock_timeout = '3s';
ALTER TABLE @schema@.outbox DROP CONSTRAINT IF EXISTS deliver_at_is_not_supported_yet;
COMMENT ON COLUMN @schema@.outbox.deliver_at IS 'Not to be sent before this time; NULL: at once. It takes its place in its key''s order when the time comes.';

ALTER TABLE @schema@.deferred
  ADD COLUMN IF NOT EXISTS maybe_sent boolean NOT NULL DEFAULT false,
  ADD COLUMN IF NOT EXISTS parked boolean NOT NULL DEFAULT false,
  ADD COLUMN IF NOT EXISTS scheduled boolean NOT NULL DEFAULT false;
CREATE INDEX IF NOT EXISTS deferred_scheduled ON @schema@.deferred (side, scope, shard, due, seq) WHERE scheduled;
CREATE INDEX IF NOT EXISTS deferred_parked ON @schema@.deferred (side, scope, seq) WHERE parked;
COMMENT ON COLUMN @schema@.deferred.maybe_sent IS 'The broker may have it all the same: the answer to an attempt was lost.';
COMMENT ON COLUMN @schema@.deferred.parked IS 'Given up, and its key waits behind it for an operator, who retries or discards it.';
COMMENT ON COLUMN @schema@.deferred.scheduled IS 'Waits for its time (due) and stands in no line until then.';

CREATE TABLE IF NOT EXISTS @schema@.cancelled (
  id         text PRIMARY KEY,
  deliver_at timestamptz NOT NULL,
  created_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX IF NOT EXISTS cancelled_old ON @schema@.cancelled (deliver_at);
COMMENT ON TABLE @schema@.cancelled IS 'Events with a deliver_at that were cancelled before it: they are not sent. Kept for 30 days after it, for relays that stood still.';
COMMENT ON COLUMN @schema@.cancelled.id IS 'The event''s id.';
SET LOCAL lock_timeout = 0;
