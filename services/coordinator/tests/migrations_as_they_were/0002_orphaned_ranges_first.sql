-- Looked for by every sweep; there are few of them, and usually none.
CREATE INDEX ranges_orphaned ON ranges (topic_id, partition) WHERE status = 'orphaned';
