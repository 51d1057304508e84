-- Version 5: destinations by name, and a log that finds itself in another cluster. @schema@ is the quoted name.

CREATE TABLE IF NOT EXISTS @schema@.destination (
  name         text PRIMARY KEY,
  start        text NOT NULL DEFAULT 'earliest' CHECK (start IN ('earliest', 'now', 'at')),
  since        timestamptz,
  replay       text,
  created_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
  looked_at    timestamptz,
  unserved     bigint NOT NULL DEFAULT 0,
  removed_at   timestamptz,
  removed_why  text,
  unpublished  bigint NOT NULL DEFAULT 0,
  deferred     bigint NOT NULL DEFAULT 0,
  dead_letters bigint NOT NULL DEFAULT 0
);
COMMENT ON TABLE @schema@.destination IS 'What is said about each destination, and the record of those that were removed.';
COMMENT ON COLUMN @schema@.destination.since IS 'Events that were enqueued before are passed over; NULL: none are.';
COMMENT ON COLUMN @schema@.destination.replay IS 'What is sent again, as JSON; NULL: no replay.';
COMMENT ON COLUMN @schema@.destination.unserved IS 'Milliseconds without a relay of its own, counted by the cleaner while it runs.';
COMMENT ON COLUMN @schema@.destination.removed_at IS 'Not NULL: it was removed, and no relay makes its cursors again.';
COMMENT ON COLUMN @schema@.destination.unpublished IS 'Events of the log that were lost by the removal; counted up to 100,000.';
INSERT INTO @schema@.destination (name) SELECT DISTINCT c.destination FROM @schema@.cursor c ON CONFLICT DO NOTHING;

ALTER TABLE @schema@.installation
  ADD COLUMN IF NOT EXISTS timeline integer,
  ADD COLUMN IF NOT EXISTS gone_position bigint NOT NULL DEFAULT 0,
  ADD COLUMN IF NOT EXISTS gone_time timestamptz;
COMMENT ON COLUMN @schema@.installation.timeline IS 'Of the server that last took a lease here: another one means a failover.';
COMMENT ON COLUMN @schema@.installation.gone_position IS 'The highest position that retention has removed from the log.';
COMMENT ON COLUMN @schema@.installation.gone_time IS 'When the newest event that retention has removed was enqueued.';

-- Notes what goes. Else as version 2 has it.
CREATE OR REPLACE FUNCTION @schema@.clean_log(p_slot integer, p_keep interval) RETURNS text LANGUAGE plpgsql VOLATILE
SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off SET lock_timeout = '20ms' AS $$
DECLARE
  child text := '@schema@.outbox_' || p_slot;
  at_home boolean;
  busy boolean;
  newest timestamptz;
  highest bigint;
BEGIN
  -- TRUNCATE heeds no snapshot. The look under the lock must see what was committed before the lock was granted.
  IF current_setting('transaction_isolation') <> 'read committed' THEN
    RAISE EXCEPTION 'pillarbox: cleaning runs at READ COMMITTED alone' USING ERRCODE = '25001';
  END IF;
  -- In another cluster the cursors' transaction ids mean nothing.
  SELECT i.system_identifier = s.system_identifier,
         p_slot IN ((extract(epoch FROM clock_timestamp())::bigint / i.slot_seconds) % 4,
                    ((extract(epoch FROM clock_timestamp()) + least(60, i.slot_seconds / 4.0))::bigint / i.slot_seconds) % 4)
    INTO at_home, busy FROM @schema@.installation i, pg_control_system() s;
  IF at_home IS NOT TRUE THEN RETURN 'elsewhere'; END IF;
  IF busy THEN RETURN 'current'; END IF;
  EXECUTE format('SELECT max(n.created_at), max(n.position) FROM generate_series(0, 63) p, LATERAL (
    SELECT o.created_at, o.position FROM %s o WHERE o.partition = p ORDER BY o.position DESC LIMIT 1) n', child)
    INTO newest, highest;
  IF newest IS NULL AND pg_relation_size(child) = 0 THEN RETURN 'empty'; END IF;
  IF newest > clock_timestamp() - p_keep THEN RETURN 'young'; END IF;
  IF NOT @schema@.settled(p_slot) THEN RETURN 'unsettled'; END IF;
  BEGIN
    -- Granted: no transaction that wrote here is still open, nor one that has read here.
    EXECUTE format('LOCK TABLE %s IN ACCESS EXCLUSIVE MODE', child);
  EXCEPTION WHEN lock_not_available THEN
    RETURN 'locked';
  END;
  -- Once more: what was open at the first look has committed perhaps.
  IF NOT @schema@.settled(p_slot) THEN RETURN 'unsettled'; END IF;
  EXECUTE format('TRUNCATE %s', child);
  UPDATE @schema@.installation i SET gone_position = greatest(i.gone_position, highest),
    gone_time = greatest(i.gone_time, newest) WHERE highest IS NOT NULL;
  RETURN 'emptied';
END $$;

-- Another cluster -------------------------------------------------------------------------------------------------------

CREATE TABLE IF NOT EXISTS @schema@.anchoring (
  at          timestamptz NOT NULL DEFAULT transaction_timestamp(),
  cause       text NOT NULL CHECK (cause IN ('cluster', 'failover')),
  before      text NOT NULL,
  now         text NOT NULL,
  destination text,
  unsettled   bigint NOT NULL DEFAULT 0
);
COMMENT ON TABLE @schema@.anchoring IS 'When this database was found in another cluster or on another timeline, and what each destination had not settled then.';

-- The destinations that have not settled an event, as their cursors say it; '' if none. What lies above a cursor's positions
-- was written since, perhaps in another cluster, whose transaction ids look old to it.
CREATE OR REPLACE FUNCTION @schema@.unsettled_by(p smallint, x xid8, pos bigint) RETURNS text LANGUAGE sql STABLE AS $$
  SELECT coalesce(string_agg(c.destination, chr(31) ORDER BY c.destination), '') FROM @schema@.cursor c
  WHERE c.partition = p AND (pos > greatest(c.base, c.last)
    OR NOT (pg_visible_in_snapshot(x, c.seen)
            OR (c.upto IS NOT NULL AND pos <= c.last AND pg_visible_in_snapshot(x, c.upto)))) $$;
COMMENT ON FUNCTION @schema@.unsettled_by IS 'Which destinations have not settled an event of the log.';

-- In another cluster transaction ids begin anew: the log's and the cursors' mean nothing there, and what is written now would
-- look settled. Each event gets an id below all real ones, one for each set of destinations that have not settled it, and
-- each cursor a snapshot of the present in which the ids of its own sets are still running. So every destination keeps
-- exactly what it has settled. The one time that the log is updated.
CREATE OR REPLACE FUNCTION @schema@.reanchor() RETURNS void LANGUAGE plpgsql VOLATILE SET jit = off AS $$
DECLARE
  present pg_snapshot;
  next_xid xid8;
  sets text[];
  everyone text;
  highest bigint;
  drawn bigint;
  sequence text := pg_get_serial_sequence('@schema@.outbox', 'position');
BEGIN
  -- One snapshot for cursors, log and present.
  IF current_setting('transaction_isolation') <> 'repeatable read' OR pg_current_xact_id_if_assigned() IS NOT NULL THEN
    RAISE EXCEPTION 'pillarbox: anchoring is a REPEATABLE READ transaction of its own' USING ERRCODE = '25001';
  END IF;
  present := pg_current_snapshot();
  next_xid := pg_current_xact_id();
  present := @schema@.restate(present, next_xid);
  INSERT INTO @schema@.cursor (destination, partition)
    SELECT DISTINCT c.destination, p FROM @schema@.cursor c, @schema@.installation i, generate_series(0, i.partitions - 1) p
    ON CONFLICT DO NOTHING;
  PERFORM FROM @schema@.cursor FOR UPDATE;

  -- A destination without a place among the sets would lose events; so what does not fit is everyone's.
  SELECT string_agg(d.destination, chr(31) ORDER BY d.destination) INTO everyone
    FROM (SELECT DISTINCT c.destination FROM @schema@.cursor c) d;
  sets := ARRAY[coalesce(everyone, '')] || ARRAY(
    SELECT DISTINCT @schema@.unsettled_by(o.partition, o.xact_id, o.position) FROM @schema@.outbox o LIMIT 500);
  UPDATE @schema@.outbox o SET xact_id = (2 + coalesce(
    array_position(sets, @schema@.unsettled_by(o.partition, o.xact_id, o.position)), 1))::text::xid8;

  INSERT INTO @schema@.anchoring (cause, before, now, destination, unsettled)
    SELECT 'cluster', i.system_identifier::text, s.system_identifier::text, d.destination, (
      SELECT count(*) FROM @schema@.outbox o
      WHERE d.destination = ANY (string_to_array(sets[o.xact_id::text::integer - 2], chr(31))))
    FROM @schema@.installation i, pg_control_system() s, (SELECT DISTINCT c.destination FROM @schema@.cursor c) d;

  -- base stays: positions drawn from now on lie above it, and what is unsettled below it is found by the ids. A replay ends at
  -- the present instead of its old end.
  UPDATE @schema@.cursor c SET owner = NULL, epoch = c.epoch + 1, expires_at = '-infinity',
    base = greatest(c.base, c.last), last = 0,
    upto = CASE WHEN c.upto IS NOT NULL AND EXISTS (
      SELECT FROM @schema@.destination d WHERE d.name = c.destination AND d.replay IS NOT NULL) THEN present END,
    seen = ('3:' || next_xid::text || ':' || array_to_string(ARRAY(
      SELECT l.x FROM (
        SELECT 2 + n AS x FROM generate_subscripts(sets, 1) n WHERE c.destination = ANY (string_to_array(sets[n], chr(31)))
        UNION ALL SELECT x::text::bigint FROM pg_snapshot_xip(present) x) l ORDER BY l.x), ','))::pg_snapshot;

  -- Where the count of positions did not come along, as with a copy of the rows alone.
  SELECT greatest((SELECT max(o.position) FROM @schema@.outbox o), (SELECT max(c.base) FROM @schema@.cursor c),
                  (SELECT max(d.position) FROM @schema@.deferred d WHERE d.side = 'relay')) INTO highest;
  EXECUTE format('SELECT last_value FROM %s', sequence) INTO drawn;
  IF highest > drawn THEN PERFORM setval(sequence, highest); END IF;
  UPDATE @schema@.installation i SET system_identifier = s.system_identifier, timeline = @schema@.timeline()
    FROM pg_control_system() s;
END $$;
COMMENT ON FUNCTION @schema@.reanchor IS 'Fits log and cursors to the transaction ids of the cluster that they are in.';

CREATE OR REPLACE FUNCTION @schema@.timeline() RETURNS integer LANGUAGE sql VOLATILE AS $$
  SELECT ('x' || substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8))::bit(32)::integer $$;
COMMENT ON FUNCTION @schema@.timeline IS 'The timeline that the server writes on.';

-- Whether log and cursors hold the transaction ids of this cluster, and no other server has taken over. What is of this
-- cluster ends below the present's end.
CREATE OR REPLACE FUNCTION @schema@.at_home() RETURNS boolean LANGUAGE sql VOLATILE SET enable_seqscan = off SET jit = off AS $$
  SELECT i.system_identifier = s.system_identifier
     AND coalesce(i.timeline = @schema@.timeline(), true)
     AND NOT EXISTS (SELECT FROM @schema@.cursor c
       WHERE greatest(pg_snapshot_xmax(c.seen), pg_snapshot_xmax(c.upto)) > pg_snapshot_xmax(pg_current_snapshot()))
     AND NOT EXISTS (SELECT FROM (SELECT o.xact_id FROM @schema@.outbox o ORDER BY o.xact_id DESC LIMIT 1) o
       WHERE o.xact_id >= pg_snapshot_xmax(pg_current_snapshot()))
  FROM @schema@.installation i, pg_control_system() s $$;
COMMENT ON FUNCTION @schema@.at_home IS 'Whether log and cursors are anchored in this cluster.';
UPDATE @schema@.installation SET timeline = @schema@.timeline();
