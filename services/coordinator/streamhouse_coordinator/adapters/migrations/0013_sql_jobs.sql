-- Continuous queries.
CREATE TABLE sql_jobs (
    job text PRIMARY KEY,
    job_id text NOT NULL,
    kind text NOT NULL,
    statement text NOT NULL,
    output_topic text NOT NULL,
    output_topic_id text NOT NULL,
    producer_id bigint NOT NULL,
    state text NOT NULL,
    reason text NOT NULL,
    created_ms bigint NOT NULL
);
CREATE TABLE base_sql_jobs (LIKE sql_jobs, PRIMARY KEY (job));
-- Which worker's session holds a job. The epoch is also the producer epoch of what the worker writes.
CREATE TABLE sql_job_leases (
    job_id text PRIMARY KEY,
    session_id text NOT NULL,
    epoch bigint NOT NULL,
    journal_number bigint NOT NULL,
    checkpoint_number bigint NOT NULL,
    journal_bytes bigint NOT NULL,
    lag_records bigint NOT NULL,
    watermark_us bigint,
    state_bytes bigint NOT NULL,
    reported_ms bigint NOT NULL
);
-- Micro-batches behind the checkpoint: run again, each gives the same output.
CREATE TABLE sql_journal (
    job_id text NOT NULL,
    number bigint NOT NULL,
    epoch bigint NOT NULL,
    entry bytea NOT NULL,
    PRIMARY KEY (job_id, number)
);
CREATE TABLE sql_checkpoints (
    job_id text PRIMARY KEY,
    number bigint NOT NULL,
    epoch bigint NOT NULL,
    checkpoint bytea NOT NULL
);
