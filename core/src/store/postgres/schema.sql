-- Version 1 of the engine's schema. @schema@ is the quoted name, @mask@ the number of log partitions less one.
-- Later versions only add: programs of the version before go on working beside them.

CREATE TABLE @schema@.installation (
  one               boolean PRIMARY KEY DEFAULT true CHECK (one),
  version           integer NOT NULL,
  oldest_program    integer NOT NULL,
  partitions        smallint NOT NULL,
  slot_seconds      integer NOT NULL,
  system_identifier bigint NOT NULL,
  created_at        timestamptz NOT NULL DEFAULT clock_timestamp()
);
COMMENT ON TABLE @schema@.installation IS 'One row: what this schema is. Made and changed by pillarbox migrate.';
COMMENT ON COLUMN @schema@.installation.version IS 'Version of the schema.';
COMMENT ON COLUMN @schema@.installation.oldest_program IS 'The oldest program that may use the schema; older ones refuse.';
COMMENT ON COLUMN @schema@.installation.partitions IS 'Partitions of the log: each has one relay at a time. A power of two.';
COMMENT ON COLUMN @schema@.installation.slot_seconds IS 'How long one slot of the log takes rows before the next one does.';
COMMENT ON COLUMN @schema@.installation.system_identifier IS 'The database cluster whose transaction ids the log and the cursors hold.';

-- The log ---------------------------------------------------------------------------------------------------------------

CREATE TABLE @schema@.outbox (
  -- Before position: defaults run in column order. The other way round, a position is drawn, a cut is made, and only then
  -- is an xid drawn, above the cut: the row would lie below the cursor and be skipped.
  xact_id      xid8 NOT NULL DEFAULT pg_current_xact_id(),
  -- Cache 1: a session that draws positions in advance would use low ones late.
  position     bigint GENERATED ALWAYS AS IDENTITY (CACHE 1),
  partition    smallint NOT NULL GENERATED ALWAYS AS
                 ((hashtextextended(topic || chr(31) || coalesce(key, id::text), 0) & @mask@)::smallint) STORED,
  -- By the clock, for space alone; order and safety never look at it.
  slot         smallint NOT NULL DEFAULT ((extract(epoch FROM clock_timestamp())::bigint / 1800) % 4)::smallint,
  created_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
  id           uuid NOT NULL DEFAULT gen_random_uuid(),
  topic        text NOT NULL,
  type         text NOT NULL,
  key          text,
  version      integer NOT NULL DEFAULT 1,
  content_type text,
  deliver_at   timestamptz CONSTRAINT deliver_at_is_not_supported_yet CHECK (deliver_at IS NULL),
  attributes   jsonb,
  headers      jsonb,
  payload      bytea
) PARTITION BY LIST (slot);
CREATE INDEX outbox_read ON @schema@.outbox (partition, position);
CREATE INDEX outbox_late ON @schema@.outbox (xact_id, position);
-- Without vacuum after inserts: it would hold off the cleaner, who waits 20 ms for a lock at most.
CREATE TABLE @schema@.outbox_0 PARTITION OF @schema@.outbox FOR VALUES IN (0) WITH (autovacuum_vacuum_insert_threshold = -1);
CREATE TABLE @schema@.outbox_1 PARTITION OF @schema@.outbox FOR VALUES IN (1) WITH (autovacuum_vacuum_insert_threshold = -1);
CREATE TABLE @schema@.outbox_2 PARTITION OF @schema@.outbox FOR VALUES IN (2) WITH (autovacuum_vacuum_insert_threshold = -1);
CREATE TABLE @schema@.outbox_3 PARTITION OF @schema@.outbox FOR VALUES IN (3) WITH (autovacuum_vacuum_insert_threshold = -1);

COMMENT ON TABLE @schema@.outbox IS
  'The log of events. Writers insert topic, type, payload and, as they like, key, content_type, headers, id, version, attributes; all else is the engine''s. Rows are never changed; old slots are emptied whole.';
COMMENT ON COLUMN @schema@.outbox.xact_id IS 'The writing transaction.';
COMMENT ON COLUMN @schema@.outbox.position IS 'The order of events of one key.';
COMMENT ON COLUMN @schema@.outbox.partition IS 'From topic and key; each partition is relayed by one process at a time.';
COMMENT ON COLUMN @schema@.outbox.slot IS 'Which child holds the row: a ring of four, by the clock.';
COMMENT ON COLUMN @schema@.outbox.id IS 'The event''s id: any UUID.';
COMMENT ON COLUMN @schema@.outbox.type IS 'The event''s type, also the routing key.';
COMMENT ON COLUMN @schema@.outbox.key IS 'Events of one topic and key stay in order; NULL: no order.';
COMMENT ON COLUMN @schema@.outbox.version IS 'Version of the payload''s schema.';
COMMENT ON COLUMN @schema@.outbox.deliver_at IS 'Kept free for a later release; a row that sets it is refused.';
COMMENT ON COLUMN @schema@.outbox.attributes IS 'CloudEvents attributes: an object of texts (source, subject, correlationid, causationid, traceparent, …).';
COMMENT ON COLUMN @schema@.outbox.headers IS 'The application''s own headers: an object of texts.';
COMMENT ON COLUMN @schema@.outbox.payload IS 'The body as it travels; NULL: a tombstone.';

-- For any language. One name each: drivers cannot tell overloads apart. No RETURNING, which would ask for the right to read.
CREATE FUNCTION @schema@.enqueue_bytes(
  topic text, type text, payload bytea, content_type text DEFAULT NULL, key text DEFAULT NULL, headers jsonb DEFAULT NULL,
  attributes jsonb DEFAULT NULL, version integer DEFAULT 1, id uuid DEFAULT gen_random_uuid(), deliver_at timestamptz DEFAULT NULL
) RETURNS uuid LANGUAGE sql VOLATILE SECURITY INVOKER AS $$
  INSERT INTO @schema@.outbox (topic, type, key, payload, content_type, headers, attributes, version, id, deliver_at)
  VALUES (enqueue_bytes.topic, enqueue_bytes.type, enqueue_bytes.key, enqueue_bytes.payload, enqueue_bytes.content_type,
          enqueue_bytes.headers, enqueue_bytes.attributes, enqueue_bytes.version, enqueue_bytes.id, enqueue_bytes.deliver_at);
  SELECT enqueue_bytes.id $$;
COMMENT ON FUNCTION @schema@.enqueue_bytes IS 'Writes an event whose payload is bytes; answers its id. Call it in the transaction that makes the event true, with named arguments.';

CREATE FUNCTION @schema@.enqueue(
  topic text, type text, payload jsonb, key text DEFAULT NULL, headers jsonb DEFAULT NULL,
  attributes jsonb DEFAULT NULL, version integer DEFAULT 1, id uuid DEFAULT gen_random_uuid(), deliver_at timestamptz DEFAULT NULL
) RETURNS uuid LANGUAGE sql VOLATILE SECURITY INVOKER AS $$
  SELECT @schema@.enqueue_bytes(
    topic => enqueue.topic, type => enqueue.type, payload => convert_to(enqueue.payload::text, 'UTF8'),
    content_type => CASE WHEN enqueue.payload IS NOT NULL THEN 'application/json' END, key => enqueue.key, headers => enqueue.headers, attributes => enqueue.attributes,
    version => enqueue.version, id => enqueue.id, deliver_at => enqueue.deliver_at) $$;
COMMENT ON FUNCTION @schema@.enqueue IS 'Writes an event with a JSON payload; answers its id. jsonb orders keys and drops spaces: enqueue_bytes keeps the bytes as they are.';

-- Reading ---------------------------------------------------------------------------------------------------------------

-- PostgreSQL's xmax is "latest completed xid + 1": a transaction that runs may have a higher xid, and low positions already.
-- n is an xid drawn after the snapshot: everything handed out before n is below the new xmax, and what lies between is listed
-- as running. The same rows are visible.
CREATE FUNCTION @schema@.restate(s pg_snapshot, n xid8) RETURNS pg_snapshot LANGUAGE sql IMMUTABLE AS $$
  SELECT (pg_snapshot_xmin(s)::text || ':' || n::text || ':' || array_to_string(ARRAY(
    SELECT x::text FROM pg_snapshot_xip(s) x
    UNION ALL SELECT generate_series(pg_snapshot_xmax(s)::text::bigint, n::text::bigint - 1)::text), ','))::pg_snapshot $$;
COMMENT ON FUNCTION @schema@.restate IS 'A snapshot whose upper end lies above every transaction id that was handed out before it was made.';

CREATE FUNCTION @schema@.cut() RETURNS pg_snapshot LANGUAGE plpgsql VOLATILE AS $$
DECLARE r pg_snapshot;
BEGIN
  -- Its snapshots list no running transactions: it calls them all visible.
  IF pg_is_in_recovery() THEN
    RAISE EXCEPTION 'pillarbox: a standby has no usable snapshot' USING ERRCODE = '25006';
  END IF;
  IF pg_current_xact_id_if_assigned() IS NOT NULL THEN
    RAISE EXCEPTION 'pillarbox: a cut must come before the transaction''s first write';
  END IF;
  SELECT @schema@.restate(pg_current_snapshot(), pg_current_xact_id()) INTO r;
  RETURN r;
END $$;
COMMENT ON FUNCTION @schema@.cut IS 'The present, restated: what a cursor may stand at.';

-- One batch of one partition, in order: first what ran at seen and has ended since (at or below base), then the rest straight
-- from the index. A function with settings of its own, because plans made on an empty or freshly loaded log last for hours:
-- (partition + 0) keeps the first part off outbox_read, LATERAL with LIMIT keeps it from becoming a join over the log.
CREATE FUNCTION @schema@.batch(p smallint, seen pg_snapshot, base bigint, upto pg_snapshot, last bigint, lim integer)
RETURNS SETOF @schema@.outbox LANGUAGE plpgsql STABLE
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET jit = off AS $$
BEGIN
  RETURN QUERY SELECT * FROM (
    (SELECT late.* FROM (
       SELECT o.* FROM pg_snapshot_xip(seen) x, LATERAL (
         SELECT * FROM @schema@.outbox o
         WHERE o.xact_id = x AND (o.partition + 0) = p AND o.position > last AND o.position <= base
         ORDER BY o.position LIMIT lim) o
       WHERE last < base AND pg_visible_in_snapshot(x, upto) ORDER BY o.position LIMIT lim) late)
    UNION ALL
    (SELECT * FROM @schema@.outbox o
     WHERE o.partition = p AND o.position > greatest(base, last)
       AND NOT pg_visible_in_snapshot(o.xact_id, seen) AND pg_visible_in_snapshot(o.xact_id, upto)
     ORDER BY o.position LIMIT lim)
  ) both_parts ORDER BY both_parts.position LIMIT lim;
END $$;
COMMENT ON FUNCTION @schema@.batch IS 'The next events of a partition between two snapshots, in order.';

-- Cursors and leases ----------------------------------------------------------------------------------------------------

-- Narrow rows in wide pages: a cursor moves ten times a second, and while a long transaction holds the horizon nothing can be
-- cleaned up behind it.
CREATE TABLE @schema@.cursor (
  destination text NOT NULL,
  partition   smallint NOT NULL,
  owner       uuid,
  epoch       bigint NOT NULL DEFAULT 0,
  expires_at  timestamptz NOT NULL DEFAULT '-infinity',
  seen        pg_snapshot NOT NULL DEFAULT '1:1:',
  base        bigint NOT NULL DEFAULT 0,
  upto        pg_snapshot,
  last        bigint NOT NULL DEFAULT 0,
  PRIMARY KEY (destination, partition)
) WITH (fillfactor = 10, autovacuum_vacuum_threshold = 50, autovacuum_vacuum_scale_factor = 0);
COMMENT ON TABLE @schema@.cursor IS 'How far each destination has come in each partition of the log, and which process moves it.';
COMMENT ON COLUMN @schema@.cursor.owner IS 'Fresh for each acquisition. With epoch it fences every write.';
COMMENT ON COLUMN @schema@.cursor.expires_at IS 'Free after this, by the database''s clock.';
COMMENT ON COLUMN @schema@.cursor.seen IS 'A restated snapshot: everything visible in it is settled.';
COMMENT ON COLUMN @schema@.cursor.base IS 'The highest position of the partition visible in seen; may be too low, never too high.';
COMMENT ON COLUMN @schema@.cursor.upto IS 'The end of the open slice; NULL between slices.';
COMMENT ON COLUMN @schema@.cursor.last IS 'Inside the open slice, everything up to this position is settled.';
INSERT INTO @schema@.cursor (destination, partition) SELECT 'main', generate_series(0, @mask@);

CREATE TABLE @schema@.source_cursor (
  grp        text NOT NULL,
  transport  text NOT NULL,
  cluster    text NOT NULL,
  name       text NOT NULL,
  partition  integer NOT NULL,
  identity   text NOT NULL,
  owner      uuid,
  epoch      bigint NOT NULL DEFAULT 0,
  expires_at timestamptz NOT NULL DEFAULT '-infinity',
  position   bigint,
  PRIMARY KEY (grp, transport, cluster, name, partition)
) WITH (fillfactor = 10, autovacuum_vacuum_threshold = 50, autovacuum_vacuum_scale_factor = 0);
COMMENT ON TABLE @schema@.source_cursor IS 'How far each consumer group has come in each queue, topic or stream, and which process reads it.';
COMMENT ON COLUMN @schema@.source_cursor.identity IS 'Of the queue, topic or stream: another one means that it was made anew.';
COMMENT ON COLUMN @schema@.source_cursor.position IS 'The last settled offset or sequence; NULL: start at the oldest, or the broker keeps it.';

CREATE TABLE @schema@.lease (
  kind       text NOT NULL,
  scope      text NOT NULL,
  shard      integer NOT NULL,
  owner      uuid,
  epoch      bigint NOT NULL DEFAULT 0,
  expires_at timestamptz NOT NULL DEFAULT '-infinity',
  PRIMARY KEY (kind, scope, shard)
) WITH (fillfactor = 10, autovacuum_vacuum_threshold = 50, autovacuum_vacuum_scale_factor = 0);
COMMENT ON TABLE @schema@.lease IS 'Who does what has no cursor.';

-- A crash, an immediate stop and a promotion empty an unlogged table; a clean restart keeps it. So a lease without its row here
-- was granted before the database forgot something: whatever its owner has read may never have been.
CREATE UNLOGGED TABLE @schema@.token (
  owner uuid PRIMARY KEY,
  home  oid NOT NULL,
  lease text NOT NULL
);
COMMENT ON TABLE @schema@.token IS 'One row for each lease that is held. Unlogged on purpose: a crash of the database empties it and so voids what owners hold in memory.';
COMMENT ON COLUMN @schema@.token.home IS 'This table''s oid when the row was written: a restored dump has another.';

-- Exceptions ------------------------------------------------------------------------------------------------------------

CREATE TABLE @schema@.deferred (
  seq           bigint GENERATED ALWAYS AS IDENTITY,
  position      bigint NOT NULL,
  line          bigint NOT NULL GENERATED ALWAYS AS (hashtextextended(topic || chr(31) || coalesce(key, id), 0)) STORED,
  due           timestamptz NOT NULL,
  time          timestamptz NOT NULL,
  created_at    timestamptz NOT NULL DEFAULT clock_timestamp(),
  first_failure timestamptz,
  last_failure  timestamptz,
  attempts      integer NOT NULL,
  shard         smallint NOT NULL,
  side          text NOT NULL CHECK (side IN ('relay', 'consumer')),
  scope         text NOT NULL,
  source        text NOT NULL,
  id            text NOT NULL,
  topic         text NOT NULL,
  type          text NOT NULL,
  key           text,
  attributes    jsonb NOT NULL,
  headers       jsonb NOT NULL,
  payload       bytea,
  reason        text,
  PRIMARY KEY (side, scope, source, id)
) WITH (autovacuum_vacuum_threshold = 200, autovacuum_vacuum_scale_factor = 0.02);
-- By a hash, because a foreign key may be longer than an index takes.
CREATE INDEX deferred_line ON @schema@.deferred (side, scope, line, position, seq);
COMMENT ON TABLE @schema@.deferred IS 'Events that wait: those that failed and will be tried again, and those of the same key behind them. Full copies.';
COMMENT ON COLUMN @schema@.deferred.side IS 'relay: on the way to the broker; consumer: on the way to a handler.';
COMMENT ON COLUMN @schema@.deferred.scope IS 'The destination, or the consumer group.';
COMMENT ON COLUMN @schema@.deferred.shard IS 'relay: the log''s partition; consumer: 0.';
COMMENT ON COLUMN @schema@.deferred.line IS 'Hash of topic and key. Events of one (topic, key) go on in the order (position, seq).';
COMMENT ON COLUMN @schema@.deferred.due IS 'When the first of its line is tried again.';
COMMENT ON COLUMN @schema@.deferred.attempts IS 'Failures so far; 0 for an event that only waits behind another.';

CREATE TABLE @schema@.dead_letter (
  seq           bigint GENERATED ALWAYS AS IDENTITY,
  position      bigint NOT NULL,
  time          timestamptz NOT NULL,
  created_at    timestamptz NOT NULL DEFAULT clock_timestamp(),
  first_failure timestamptz NOT NULL,
  last_failure  timestamptz NOT NULL,
  copied_at     timestamptz,
  attempts      integer NOT NULL,
  shard         smallint NOT NULL,
  maybe_sent    boolean NOT NULL,
  side          text NOT NULL CHECK (side IN ('relay', 'consumer')),
  scope         text NOT NULL,
  source        text NOT NULL,
  id            text NOT NULL,
  topic         text NOT NULL,
  type          text NOT NULL,
  key           text,
  attributes    jsonb NOT NULL,
  headers       jsonb NOT NULL,
  payload       bytea,
  reason        text NOT NULL,
  PRIMARY KEY (side, scope, source, id)
);
CREATE INDEX dead_letter_order ON @schema@.dead_letter (side, scope, seq);
CREATE INDEX dead_letter_uncopied ON @schema@.dead_letter (scope, seq) WHERE copied_at IS NULL AND side = 'consumer';
COMMENT ON TABLE @schema@.dead_letter IS 'Events that were given up, whole, with the reason. Operators look at them, retry or delete them.';
COMMENT ON COLUMN @schema@.dead_letter.maybe_sent IS 'The broker may have it all the same: an answer was lost before it was refused.';
COMMENT ON COLUMN @schema@.dead_letter.copied_at IS 'When the broker took the copy for its dead-letter address; NULL: not yet.';

-- Takes an event out of its line, by the index whatever the statistics say.
CREATE FUNCTION @schema@.leave_line(p_side text, p_scope text, p_source text, p_id text)
RETURNS SETOF @schema@.deferred LANGUAGE plpgsql VOLATILE SET enable_seqscan = off SET jit = off AS $$
BEGIN
  RETURN QUERY DELETE FROM @schema@.deferred d
    WHERE d.side = p_side AND d.scope = p_scope AND d.source = p_source AND d.id = p_id RETURNING d.*;
END $$;
COMMENT ON FUNCTION @schema@.leave_line IS 'Deletes and answers one waiting event.';

-- For each event, whether a line of its key exists or it waits itself.
CREATE FUNCTION @schema@.waiting(p_scope text, topics text[], keys text[], sources text[], ids text[])
RETURNS SETOF boolean LANGUAGE plpgsql STABLE SET enable_seqscan = off SET jit = off AS $$
BEGIN
  IF NOT EXISTS (SELECT FROM @schema@.deferred d WHERE d.side = 'consumer' AND d.scope = p_scope) THEN
    RETURN QUERY SELECT false FROM unnest(ids);
    RETURN;
  END IF;
  RETURN QUERY
    SELECT EXISTS (SELECT FROM @schema@.deferred d
                   WHERE d.side = 'consumer' AND d.scope = p_scope AND d.line = hashtextextended(m.topic || chr(31) || m.key, 0)
                     AND d.topic = m.topic AND d.key = m.key)
        OR EXISTS (SELECT FROM @schema@.deferred d
                   WHERE d.side = 'consumer' AND d.scope = p_scope AND d.source = m.source AND d.id = m.id)
    FROM unnest(topics, keys, sources, ids) WITH ORDINALITY AS m (topic, key, source, id, n) ORDER BY m.n;
END $$;
COMMENT ON FUNCTION @schema@.waiting IS 'For each event of a consumer group, whether it must wait: its key has a line, or it waits itself.';

-- The inbox -------------------------------------------------------------------------------------------------------------

-- The slot is a function of the event, never of its arrival: only then is an event that comes twice found in one place. The
-- ring says which child is emptied; the slot keeps the ring's turns apart.
CREATE TABLE @schema@.inbox (
  slot    bigint NOT NULL,
  arrived timestamptz NOT NULL DEFAULT clock_timestamp(),
  ring    smallint NOT NULL,
  dead    boolean NOT NULL DEFAULT false,
  grp     text NOT NULL,
  source  text NOT NULL,
  id      text NOT NULL,
  PRIMARY KEY (ring, slot, grp, source, id)
) PARTITION BY LIST (ring);
CREATE TABLE @schema@.inbox_0 PARTITION OF @schema@.inbox FOR VALUES IN (0);
CREATE TABLE @schema@.inbox_1 PARTITION OF @schema@.inbox FOR VALUES IN (1);
CREATE TABLE @schema@.inbox_2 PARTITION OF @schema@.inbox FOR VALUES IN (2);
CREATE TABLE @schema@.inbox_3 PARTITION OF @schema@.inbox FOR VALUES IN (3);
CREATE TABLE @schema@.inbox_4 PARTITION OF @schema@.inbox FOR VALUES IN (4);
CREATE TABLE @schema@.inbox_5 PARTITION OF @schema@.inbox FOR VALUES IN (5);
CREATE TABLE @schema@.inbox_6 PARTITION OF @schema@.inbox FOR VALUES IN (6);
CREATE TABLE @schema@.inbox_7 PARTITION OF @schema@.inbox FOR VALUES IN (7);
COMMENT ON TABLE @schema@.inbox IS 'Which events each consumer group has applied or given up: one effect for each.';
COMMENT ON COLUMN @schema@.inbox.slot IS 'floor(event time / 6 h).';
COMMENT ON COLUMN @schema@.inbox.ring IS 'slot modulo 8: which child holds the row.';
COMMENT ON COLUMN @schema@.inbox.dead IS 'Given up, not applied. A retry turns it into applied.';

CREATE TABLE @schema@.inbox_timeless (
  arrived timestamptz NOT NULL DEFAULT clock_timestamp(),
  dead    boolean NOT NULL DEFAULT false,
  grp     text NOT NULL,
  source  text NOT NULL,
  id      text NOT NULL,
  PRIMARY KEY (grp, source, id)
);
COMMENT ON TABLE @schema@.inbox_timeless IS 'The inbox for events that carry no time.';

-- True if the event is new to the group. p_ring and p_slot NULL: it carries no time.
CREATE FUNCTION @schema@.remember(p_grp text, p_ring smallint, p_slot bigint, p_source text, p_id text, p_dead boolean)
RETURNS boolean LANGUAGE plpgsql VOLATILE SET enable_seqscan = off SET jit = off AS $$
DECLARE retried boolean;
BEGIN
  IF p_ring IS NULL THEN
    INSERT INTO @schema@.inbox_timeless (grp, source, id, dead) VALUES (p_grp, p_source, p_id, p_dead) ON CONFLICT DO NOTHING;
  ELSE
    INSERT INTO @schema@.inbox (ring, slot, grp, source, id, dead)
    VALUES (p_ring, p_slot, p_grp, p_source, p_id, p_dead) ON CONFLICT DO NOTHING;
  END IF;
  IF FOUND THEN RETURN true; END IF;
  IF p_dead THEN RETURN false; END IF;
  -- A dead letter that an operator moved back to its line is applied now; one that the broker brings again is not.
  SELECT EXISTS (SELECT FROM @schema@.deferred d
    WHERE d.side = 'consumer' AND d.scope = p_grp AND d.source = p_source AND d.id = p_id) INTO retried;
  IF NOT retried THEN RETURN false; END IF;
  IF p_ring IS NULL THEN
    UPDATE @schema@.inbox_timeless i SET dead = false
    WHERE i.grp = p_grp AND i.source = p_source AND i.id = p_id AND i.dead;
  ELSE
    UPDATE @schema@.inbox i SET dead = false
    WHERE i.ring = p_ring AND i.slot = p_slot AND i.grp = p_grp AND i.source = p_source AND i.id = p_id AND i.dead;
  END IF;
  RETURN FOUND;
END $$;
COMMENT ON FUNCTION @schema@.remember IS 'Writes an event into the inbox; false if it is there already.';

INSERT INTO @schema@.installation (version, oldest_program, partitions, slot_seconds, system_identifier)
SELECT 1, 1, @mask@ + 1, 1800, system_identifier FROM pg_control_system();
