-- Migrations 0001 and 0002 were changed after they had been applied: databases of before lack what was added. No others do.
ALTER TABLE group_member_state ADD COLUMN IF NOT EXISTS complete boolean NOT NULL DEFAULT false;
ALTER TABLE group_member_state ALTER COLUMN complete DROP DEFAULT;
CREATE TABLE IF NOT EXISTS sweeps (name text PRIMARY KEY, last_ms bigint NOT NULL);
CREATE INDEX IF NOT EXISTS ranges_lost ON ranges (wal_id) WHERE status = 'lost';
