-- Of an ingest agent's session: its log's disk has no room, so that others are to lead.
ALTER TABLE session_leases ADD COLUMN log_full boolean NOT NULL DEFAULT false;
