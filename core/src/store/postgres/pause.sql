-- Version 4: what operators hold back for a while.

CREATE TABLE IF NOT EXISTS @schema@.pause (
  side     text NOT NULL CHECK (side IN ('relay', 'consumer')),
  scope    text NOT NULL,
  topic    text NOT NULL DEFAULT '',
  keyed    boolean NOT NULL DEFAULT false,
  key      text NOT NULL DEFAULT '',
  begun_at timestamptz NOT NULL DEFAULT clock_timestamp(),
  ends_at  timestamptz NOT NULL,
  reason   text NOT NULL,
  operator text NOT NULL,
  PRIMARY KEY (side, scope, topic, keyed, key)
);
COMMENT ON TABLE @schema@.pause IS 'What operators hold back. Relays and consumers look once a second; rows that are over are removed.';
COMMENT ON COLUMN @schema@.pause.side IS 'relay: scope is a destination. consumer: scope is a group.';
COMMENT ON COLUMN @schema@.pause.topic IS 'This topic alone; empty: all.';
COMMENT ON COLUMN @schema@.pause.keyed IS 'This key of the topic alone.';
COMMENT ON COLUMN @schema@.pause.ends_at IS 'When it ends by itself.';
