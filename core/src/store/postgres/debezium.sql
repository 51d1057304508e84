-- Debezium's outbox table as the view "@view_schema@"."@view@": what is inserted into it becomes an event of the log.
DO $pillarbox$
DECLARE there regclass;
BEGIN
PERFORM pg_advisory_xact_lock(hashtextextended('pillarbox migrate @engine@', 0));
there := to_regclass('"@view_schema@"."@view@"');
IF there IS NOT NULL AND coalesce(obj_description(there, 'pg_class'), '') NOT LIKE '@ours@%' THEN
  RAISE EXCEPTION '"@view_schema@"."@view@" exists and is not this view: rename it first' USING ERRCODE = '42P07';
END IF;
-- Only for another type of the payload: what was granted on the view goes with it.
IF (SELECT a.atttypid <> '@payload@'::regtype FROM pg_attribute a WHERE a.attrelid = there AND a.attname = 'payload') THEN
  DROP VIEW "@view_schema@"."@view@";
  there := NULL;
END IF;
IF there IS NOT NULL THEN
  DROP TRIGGER enqueue ON "@view_schema@"."@view@";
  DROP TRIGGER forget ON "@view_schema@"."@view@";
  DROP TRIGGER refuse ON "@view_schema@"."@view@";
END IF;

-- Rights on the view are enough: the function writes with those of its owner, and nothing but the contract's columns.
CREATE OR REPLACE FUNCTION "@engine@".debezium_insert() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp AS $body$
DECLARE
  content_type text;
  body bytea;
BEGIN
  IF TG_ARGV[1] = 'bytea' THEN
    body := NEW.payload;
  ELSE
    body := convert_to(NEW.payload::text, 'UTF8');
    content_type := CASE WHEN body IS NOT NULL THEN 'application/json' END;
  END IF;
  IF NEW.aggregatetype IS NULL AND TG_ARGV[0] LIKE '%{aggregatetype}%' THEN
    RAISE EXCEPTION 'aggregatetype is NULL, and the event''s topic is made of it' USING ERRCODE = '23502';
  END IF;
  NEW.id := coalesce(NEW.id, gen_random_uuid());
  INSERT INTO "@engine@".outbox (topic, type, key, payload, content_type, id)
  VALUES (replace(TG_ARGV[0], '{aggregatetype}', coalesce(NEW.aggregatetype, '')), NEW.type, NEW.aggregateid, body,
          content_type, NEW.id);
  RETURN NEW;
END $body$;
COMMENT ON FUNCTION "@engine@".debezium_insert IS 'Turns a row of Debezium''s outbox table into an event. Arguments of the trigger: topic, type of the payload.';

-- Many writers delete the row at once, to keep the table small. The event stays.
CREATE OR REPLACE FUNCTION "@engine@".debezium_delete() RETURNS trigger LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp AS $body$
BEGIN
  RETURN OLD;
END $body$;
COMMENT ON FUNCTION "@engine@".debezium_delete IS 'Takes the DELETE after an INSERT for done: the event stays in the log.';

-- Without it, the view would let it through to the log.
CREATE OR REPLACE FUNCTION "@engine@".debezium_update() RETURNS trigger LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp AS $body$
BEGIN
  RAISE EXCEPTION 'an event that was written is never changed: insert another one' USING ERRCODE = '0A000';
END $body$;
COMMENT ON FUNCTION "@engine@".debezium_update IS 'Refuses to change an event.';

-- Shows what the own transaction has written, by the index on xact_id: enough for a writer that deletes its row again.
CREATE OR REPLACE VIEW "@view_schema@"."@view@" AS
  SELECT o.id, @aggregatetype@ AS aggregatetype, o.key AS aggregateid, o.type, NULL::@payload@ AS payload
  FROM "@engine@".outbox o
  WHERE o.xact_id = pg_current_xact_id_if_assigned() AND starts_with(o.topic, '@before@');
ALTER VIEW "@view_schema@"."@view@" ALTER COLUMN id SET DEFAULT gen_random_uuid();
COMMENT ON VIEW "@view_schema@"."@view@" IS
  '@ours@Debezium''s outbox table. A row that is inserted becomes an event of the topic @topic@; the view shows those of the own transaction alone, without payloads.';
CREATE TRIGGER enqueue INSTEAD OF INSERT ON "@view_schema@"."@view@"
  FOR EACH ROW EXECUTE FUNCTION "@engine@".debezium_insert('@topic@', '@payload@');
CREATE TRIGGER forget INSTEAD OF DELETE ON "@view_schema@"."@view@"
  FOR EACH ROW EXECUTE FUNCTION "@engine@".debezium_delete();
CREATE TRIGGER refuse INSTEAD OF UPDATE ON "@view_schema@"."@view@"
  FOR EACH ROW EXECUTE FUNCTION "@engine@".debezium_update();
END $pillarbox$;
