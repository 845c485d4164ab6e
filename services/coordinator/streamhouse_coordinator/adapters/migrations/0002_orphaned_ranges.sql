-- Looked for by every sweep; there are few of them, and usually none.
CREATE INDEX ranges_orphaned ON ranges (topic_id, partition) WHERE status = 'orphaned';
-- An agent that comes back is told which ranges of its log were given up.
CREATE INDEX ranges_lost ON ranges (wal_id) WHERE status = 'lost';
