-- Newest epoch of a SQL job that did not end without a word: workers count crashes from there.
ALTER TABLE sql_job_leases ADD COLUMN ended_epoch bigint NOT NULL DEFAULT 0;
