-- Version 2: retention. @schema@ is the quoted name.

-- The log ---------------------------------------------------------------------------------------------------------------

-- Whether every destination is done with a slot. One without a row for a partition that occurs in the slot is not: a new one
-- would find nothing. By partition, so that an idle partition's old cursor holds nothing back; and with the open slice, for a
-- backlog of days is one slice. What is unsettled at or below greatest(base, last) ran at seen or at upto, for both list all
-- that ran. A row that lies too high may be settled all the same; then the slot waits for the next look.
CREATE FUNCTION @schema@.settled(p_slot integer) RETURNS boolean LANGUAGE plpgsql VOLATILE
SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off AS $$
DECLARE answer boolean;
BEGIN
  EXECUTE format($query$
    SELECT EXISTS (SELECT FROM @schema@.cursor) AND NOT EXISTS (
      SELECT FROM (SELECT DISTINCT c.destination FROM @schema@.cursor c) d
      CROSS JOIN (SELECT p FROM generate_series(0, 63) p WHERE EXISTS (SELECT FROM %1$s o WHERE o.partition = p)) occurs
      LEFT JOIN @schema@.cursor c ON c.destination = d.destination AND c.partition = occurs.p
      WHERE c.partition IS NULL
         OR EXISTS (SELECT FROM %1$s o WHERE o.partition = c.partition AND o.position > greatest(c.base, c.last))
         OR EXISTS (SELECT FROM pg_snapshot_xip(c.seen) x, LATERAL (
              SELECT FROM %1$s o WHERE o.xact_id = x AND (o.partition + 0) = c.partition AND o.position > c.last LIMIT 1) late)
         OR EXISTS (SELECT FROM pg_snapshot_xip(c.upto) x, LATERAL (
              SELECT FROM %1$s o WHERE o.xact_id = x AND (o.partition + 0) = c.partition LIMIT 1) late))
    $query$, '@schema@.outbox_' || p_slot) INTO answer;
  RETURN answer;
END $$;
COMMENT ON FUNCTION @schema@.settled IS 'Whether every destination is done with what is visible in a slot of the log.';

-- Empties a slot, if all of it is settled and older than p_keep. Safe without any lease. Nobody waits for it longer than the
-- lock's 20 ms, and writers not at all: they write into another slot.
CREATE FUNCTION @schema@.clean_log(p_slot integer, p_keep interval) RETURNS text LANGUAGE plpgsql VOLATILE
SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off SET lock_timeout = '20ms' AS $$
DECLARE
  child text := '@schema@.outbox_' || p_slot;
  at_home boolean;
  busy boolean;
  newest timestamptz;
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
  EXECUTE format('SELECT max(n.created_at) FROM generate_series(0, 63) p, LATERAL (
    SELECT o.created_at FROM %s o WHERE o.partition = p ORDER BY o.position DESC LIMIT 1) n', child) INTO newest;
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
  RETURN 'emptied';
END $$;
COMMENT ON FUNCTION @schema@.clean_log IS 'Empties a slot of the log if every destination is done with it; answers what it found.';

-- A slot is emptied while the three others take rows, so that the ring must turn in more than the time for which rows are
-- kept. Says what is the matter; nothing if the slots are as they should be.
CREATE FUNCTION @schema@.fit_slots(p_keep interval) RETURNS text LANGUAGE plpgsql VOLATILE SET lock_timeout = '20ms' AS $$
DECLARE wanted integer := greatest(1800, ceil(extract(epoch FROM p_keep) / 2)::integer);
BEGIN
  IF p_keep <= (SELECT i.slot_seconds FROM @schema@.installation i) * interval '2 s' THEN RETURN NULL; END IF;
  EXECUTE format('ALTER TABLE @schema@.outbox ALTER COLUMN slot SET DEFAULT
    ((extract(epoch FROM clock_timestamp())::bigint / %s) %% 4)::smallint', wanted);
  UPDATE @schema@.installation SET slot_seconds = wanted;
  RETURN NULL;
EXCEPTION
  WHEN lock_not_available THEN RETURN 'locked';
  WHEN insufficient_privilege THEN RETURN 'denied';
END $$;
COMMENT ON FUNCTION @schema@.fit_slots IS 'Lengthens the slots of the log for a longer retention.';

-- The inbox -------------------------------------------------------------------------------------------------------------

-- By these alone it is known which sources occur in a child, and when the last event of each arrived.
CREATE INDEX inbox_source ON @schema@.inbox (grp, source, arrived);
CREATE INDEX inbox_timeless_source ON @schema@.inbox_timeless (grp, source, arrived);
COMMENT ON TABLE @schema@.inbox_timeless IS
  'The inbox for events that carry no time; and for those of sources that have been silent for longer than the ring turns.';

CREATE TABLE @schema@.inbox_clock (
  grp     text NOT NULL,
  source  text NOT NULL,
  at      timestamptz NOT NULL,
  running bigint NOT NULL,
  PRIMARY KEY (grp, source, at)
) WITH (fillfactor = 50, autovacuum_vacuum_threshold = 200, autovacuum_vacuum_scale_factor = 0.1);
COMMENT ON TABLE @schema@.inbox_clock IS 'How long each source of a group has been running: the inbox forgets by that, not by the calendar.';
COMMENT ON COLUMN @schema@.inbox_clock.at IS 'An arrival.';
COMMENT ON COLUMN @schema@.inbox_clock.running IS 'Milliseconds of traffic up to then; a gap between arrivals counts 60 s at most.';

CREATE FUNCTION @schema@.inbox_sources(p_child text) RETURNS TABLE (grp text, source text, newest timestamptz)
LANGUAGE plpgsql VOLATILE SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off AS $$
BEGIN
  -- From one source to the next by the index, whatever they hold.
  RETURN QUERY EXECUTE format('
    WITH RECURSIVE s AS (
      (SELECT i.grp, i.source FROM %1$s i ORDER BY i.grp, i.source LIMIT 1)
      UNION ALL
      SELECT n.grp, n.source FROM s, LATERAL (
        SELECT i.grp, i.source FROM %1$s i WHERE (i.grp, i.source) > (s.grp, s.source) ORDER BY i.grp, i.source LIMIT 1) n)
    SELECT s.grp, s.source,
      (SELECT i.arrived FROM %1$s i WHERE i.grp = s.grp AND i.source = s.source ORDER BY i.arrived DESC LIMIT 1) FROM s',
    p_child);
END $$;
COMMENT ON FUNCTION @schema@.inbox_sources IS 'The groups and sources that occur in a part of the inbox, each with its last arrival.';

-- What arrived by then may be forgotten; NULL: nothing yet.
CREATE FUNCTION @schema@.forgettable(p_grp text, p_source text, p_remember interval) RETURNS timestamptz LANGUAGE sql STABLE AS $$
  SELECT max(c.at) FROM @schema@.inbox_clock c
  WHERE c.grp = p_grp AND c.source = p_source AND c.running <= (
    SELECT max(l.running) FROM @schema@.inbox_clock l WHERE l.grp = p_grp AND l.source = p_source
  ) - (extract(epoch FROM p_remember) * 1000)::bigint $$;
COMMENT ON FUNCTION @schema@.forgettable IS 'The arrival behind which a source has been running for as long as the inbox remembers.';

-- Moves the sources' clocks by what has arrived. The newest point of each moves along; one in sixteen of the time to remember
-- stays, as something to look back to.
CREATE FUNCTION @schema@.inbox_tick(p_remember interval) RETURNS void LANGUAGE plpgsql VOLATILE
SET enable_seqscan = off SET jit = off AS $$
DECLARE
  step bigint := (extract(epoch FROM p_remember) * 1000 / 16)::bigint;
  s record;
  newest record;
  before bigint;
  passed bigint;
BEGIN
  FOR s IN
    SELECT q.grp, q.source, max(q.newest) AS newest FROM (
      SELECT c.grp, c.source, NULL::timestamptz AS newest FROM @schema@.inbox_clock c
      UNION ALL SELECT * FROM @schema@.inbox_sources('@schema@.inbox_timeless')
      UNION ALL SELECT n.* FROM generate_series(0, 7) r, LATERAL @schema@.inbox_sources('@schema@.inbox_' || r) n
    ) q GROUP BY q.grp, q.source
  LOOP
    SELECT c.at, c.running INTO newest FROM @schema@.inbox_clock c
      WHERE c.grp = s.grp AND c.source = s.source ORDER BY c.at DESC LIMIT 1;
    SELECT c.running INTO before FROM @schema@.inbox_clock c
      WHERE c.grp = s.grp AND c.source = s.source ORDER BY c.at DESC OFFSET 1 LIMIT 1;
    IF s.newest IS NULL THEN
      DELETE FROM @schema@.inbox_clock c WHERE c.grp = s.grp AND c.source = s.source;
    ELSIF newest.at IS NULL OR newest.at > clock_timestamp() + interval '1 minute' THEN
      -- The first time; or the database's clock was set back, and what it said before would forget what arrives now.
      DELETE FROM @schema@.inbox_clock c WHERE c.grp = s.grp AND c.source = s.source;
      INSERT INTO @schema@.inbox_clock (grp, source, at, running)
      VALUES (s.grp, s.source, least(s.newest, clock_timestamp()), 0);
    ELSIF s.newest > newest.at THEN
      passed := newest.running + least(extract(epoch FROM s.newest - newest.at) * 1000, 60000)::bigint;
      IF passed - before < step THEN
        UPDATE @schema@.inbox_clock c SET at = s.newest, running = passed
        WHERE c.grp = s.grp AND c.source = s.source AND c.at = newest.at;
      ELSE
        INSERT INTO @schema@.inbox_clock (grp, source, at, running) VALUES (s.grp, s.source, s.newest, passed);
        DELETE FROM @schema@.inbox_clock c WHERE c.grp = s.grp AND c.source = s.source
          AND c.at < @schema@.forgettable(s.grp, s.source, p_remember);
      END IF;
    END IF;
  END LOOP;
END $$;
COMMENT ON FUNCTION @schema@.inbox_tick IS 'Moves the clocks of the sources by what has arrived since the last call.';

-- Empties a part of the ring. p_kept: everything in it that may not be forgotten was copied to inbox_timeless, up to this arrival.
CREATE FUNCTION @schema@.clean_inbox(p_ring integer, p_remember interval, p_kept timestamptz) RETURNS text LANGUAGE plpgsql VOLATILE
SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off SET lock_timeout = '20ms' AS $$
DECLARE
  child text := '@schema@.inbox_' || p_ring;
  present bigint := floor(extract(epoch FROM clock_timestamp()) / 21600)::bigint;
  check_due text := format('SELECT count(*) = 0 OR bool_and(coalesce(s.newest <= @schema@.forgettable(s.grp, s.source, %L), false)),
    coalesce(max(s.newest) <= %L, true) FROM @schema@.inbox_sources(%L) s', p_remember, p_kept, child);
  due boolean;
  unchanged boolean;
  mixed boolean;
BEGIN
  IF current_setting('transaction_isolation') <> 'read committed' THEN
    RAISE EXCEPTION 'pillarbox: cleaning runs at READ COMMITTED alone' USING ERRCODE = '25001';
  END IF;
  IF pg_relation_size(child) = 0 THEN RETURN 'empty'; END IF;
  -- Fresh events come here.
  IF p_ring = present % 8 THEN RETURN 'current'; END IF;
  EXECUTE check_due INTO due, unchanged;
  IF NOT due AND p_kept IS NULL THEN
    -- The ring is about to come round once more, and has done so before without emptying this.
    EXECUTE format('SELECT min(i.slot) <> max(i.slot) FROM %s i', child) INTO mixed;
    RETURN CASE WHEN mixed AND p_ring = (present + 1) % 8 THEN 'crowded' ELSE 'young' END;
  END IF;
  BEGIN
    EXECUTE format('LOCK TABLE %s IN ACCESS EXCLUSIVE MODE', child);
  EXCEPTION WHEN lock_not_available THEN
    RETURN 'locked';
  END;
  EXECUTE check_due INTO due, unchanged;
  IF NOT due AND (p_kept IS NULL OR NOT unchanged) THEN RETURN 'young'; END IF;
  EXECUTE format('TRUNCATE %s', child);
  RETURN 'emptied';
END $$;
COMMENT ON FUNCTION @schema@.clean_inbox IS 'Empties a part of the inbox that may be forgotten; answers what it found.';

-- The last arrival in a part of the ring, at a moment when nobody who wrote there was still open; NULL: somebody was.
CREATE FUNCTION @schema@.quiet_inbox(p_ring integer) RETURNS timestamptz LANGUAGE plpgsql VOLATILE SET lock_timeout = '20ms' AS $$
BEGIN
  EXECUTE format('LOCK TABLE %s IN SHARE MODE', '@schema@.inbox_' || p_ring);
  RETURN (SELECT max(s.newest) FROM @schema@.inbox_sources('@schema@.inbox_' || p_ring) s);
EXCEPTION WHEN lock_not_available THEN
  RETURN NULL;
END $$;
COMMENT ON FUNCTION @schema@.quiet_inbox IS 'The last arrival in a part of the inbox that nobody is writing to.';

-- At most p_limit events that carry no time, or have outlasted the ring. Answers how many.
CREATE FUNCTION @schema@.forget_timeless(p_remember interval, p_limit integer) RETURNS bigint LANGUAGE plpgsql VOLATILE
SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off AS $$
DECLARE
  s record;
  upto timestamptz;
  done bigint := 0;
  n bigint;
BEGIN
  FOR s IN SELECT * FROM @schema@.inbox_sources('@schema@.inbox_timeless') LOOP
    upto := @schema@.forgettable(s.grp, s.source, p_remember);
    CONTINUE WHEN upto IS NULL;
    DELETE FROM @schema@.inbox_timeless t WHERE t.grp = s.grp AND t.source = s.source AND t.id IN (
      SELECT i.id FROM @schema@.inbox_timeless i
      WHERE i.grp = s.grp AND i.source = s.source AND i.arrived <= upto ORDER BY i.arrived LIMIT p_limit - done);
    GET DIAGNOSTICS n = ROW_COUNT;
    done := done + n;
    EXIT WHEN done >= p_limit;
  END LOOP;
  RETURN done;
END $$;
COMMENT ON FUNCTION @schema@.forget_timeless IS 'Deletes some of what the inbox may forget outside of the ring.';

-- True if the event is new to the group. p_ring and p_slot NULL: it carries no time.
CREATE OR REPLACE FUNCTION @schema@.remember(p_grp text, p_ring smallint, p_slot bigint, p_source text, p_id text, p_dead boolean)
RETURNS boolean LANGUAGE plpgsql VOLATILE SET enable_seqscan = off SET jit = off AS $$
DECLARE
  timeless boolean := p_ring IS NULL;
  retried boolean;
BEGIN
  IF timeless THEN
    INSERT INTO @schema@.inbox_timeless (grp, source, id, dead) VALUES (p_grp, p_source, p_id, p_dead) ON CONFLICT DO NOTHING;
    IF FOUND THEN RETURN true; END IF;
  ELSE
    INSERT INTO @schema@.inbox (ring, slot, grp, source, id, dead)
    VALUES (p_ring, p_slot, p_grp, p_source, p_id, p_dead) ON CONFLICT DO NOTHING;
    IF FOUND THEN
      -- After the INSERT, which keeps its part of the ring from being emptied: before it, the row could be moved between the
      -- two looks, and neither would find it.
      IF NOT EXISTS (SELECT FROM @schema@.inbox_timeless i WHERE i.grp = p_grp AND i.source = p_source AND i.id = p_id) THEN
        RETURN true;
      END IF;
      DELETE FROM @schema@.inbox i
      WHERE i.ring = p_ring AND i.slot = p_slot AND i.grp = p_grp AND i.source = p_source AND i.id = p_id;
      timeless := true;
    END IF;
  END IF;
  IF p_dead THEN RETURN false; END IF;
  -- A dead letter that an operator moved back to its line is applied now; one that the broker brings again is not.
  SELECT EXISTS (SELECT FROM @schema@.deferred d
    WHERE d.side = 'consumer' AND d.scope = p_grp AND d.source = p_source AND d.id = p_id) INTO retried;
  IF NOT retried THEN RETURN false; END IF;
  IF timeless THEN
    UPDATE @schema@.inbox_timeless i SET dead = false
    WHERE i.grp = p_grp AND i.source = p_source AND i.id = p_id AND i.dead;
  ELSE
    UPDATE @schema@.inbox i SET dead = false
    WHERE i.ring = p_ring AND i.slot = p_slot AND i.grp = p_grp AND i.source = p_source AND i.id = p_id AND i.dead;
  END IF;
  RETURN FOUND;
END $$;
