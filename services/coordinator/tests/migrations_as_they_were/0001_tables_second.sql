-- Events: the truth. position is gapless and in commit order.
CREATE TABLE events (
    position bigint PRIMARY KEY,
    stream_id text NOT NULL,
    version bigint NOT NULL,
    type text NOT NULL,
    payload text NOT NULL,
    trace_context text NOT NULL,
    created_ms bigint NOT NULL,
    UNIQUE (stream_id, version)
);
CREATE TABLE event_position (only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row), position bigint NOT NULL);
INSERT INTO event_position (position) VALUES (0);
CREATE TABLE outbox (only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row), position bigint NOT NULL);
INSERT INTO outbox (position) VALUES (0);
CREATE SEQUENCE producer_ids;

-- Projections: built from the events only.
CREATE TABLE topics (
    topic_id text PRIMARY KEY,
    topic text NOT NULL UNIQUE,
    partitions bigint NOT NULL,
    retention_ms bigint,
    retention_bytes bigint,
    min_acks bigint NOT NULL,
    unclean_recovery_after_ms bigint,
    created_ms bigint NOT NULL
);
CREATE TABLE partitions (
    topic_id text NOT NULL,
    partition bigint NOT NULL,
    epoch bigint NOT NULL,
    log_start_offset bigint NOT NULL,
    PRIMARY KEY (topic_id, partition)
);
CREATE TABLE ranges (
    topic_id text NOT NULL,
    partition bigint NOT NULL,
    epoch bigint NOT NULL,
    start_offset bigint NOT NULL,
    limit_offset bigint NOT NULL,
    registered_end bigint NOT NULL,
    end_offset bigint,
    status text NOT NULL CHECK (status IN ('open', 'orphaned', 'settled', 'lost')),
    session_id text NOT NULL,
    agent_id text NOT NULL,
    wal_id text NOT NULL,
    moving boolean NOT NULL,
    PRIMARY KEY (topic_id, partition, epoch),
    CHECK (start_offset <= registered_end AND registered_end <= limit_offset),
    CHECK (end_offset BETWEEN registered_end AND limit_offset),
    CHECK ((end_offset IS NULL) = (status IN ('open', 'orphaned')))
);
CREATE INDEX ranges_unfinished ON ranges (wal_id)
    WHERE status <> 'lost' AND registered_end IS DISTINCT FROM end_offset;
CREATE INDEX ranges_open ON ranges (session_id) WHERE status = 'open';
CREATE TABLE sessions (
    session_id text PRIMARY KEY,
    agent_id text NOT NULL,
    role text NOT NULL,
    address text NOT NULL,
    wal_id text NOT NULL,
    started_ms bigint NOT NULL
);
CREATE TABLE buffers (
    buffer_id text PRIMARY KEY,
    session_id text NOT NULL,
    agent_id text NOT NULL,
    wal_id text NOT NULL
);
CREATE INDEX buffers_of_wal ON buffers (wal_id);
CREATE TABLE buffer_slices (
    buffer_id text NOT NULL,
    topic_id text NOT NULL,
    partition bigint NOT NULL,
    epoch bigint NOT NULL,
    base_offset bigint NOT NULL,
    end_offset bigint NOT NULL,
    record_count bigint NOT NULL,
    size_bytes bigint NOT NULL,
    PRIMARY KEY (buffer_id, topic_id, partition, epoch, base_offset)
);
CREATE TABLE segments (
    segment_id text PRIMARY KEY,
    topic_id text NOT NULL,
    partition bigint NOT NULL,
    epoch bigint NOT NULL,
    base_offset bigint NOT NULL,
    end_offset bigint NOT NULL,
    record_count bigint NOT NULL,
    object_key text NOT NULL,
    object_at bigint NOT NULL,
    size_bytes bigint NOT NULL,
    raw_bytes bigint NOT NULL,
    first_timestamp_ms bigint NOT NULL,
    max_timestamp_ms bigint NOT NULL,
    lost_reason text NOT NULL,
    -- two segments of a partition never begin at the same offset: a second belt for what registration checks
    UNIQUE (topic_id, partition, base_offset) DEFERRABLE INITIALLY DEFERRED
);
CREATE INDEX segments_of_object ON segments (object_key);
CREATE TABLE groups (
    group_name text PRIMARY KEY,
    generation bigint NOT NULL,
    assignment text NOT NULL
);
CREATE TABLE group_members (
    group_name text NOT NULL,
    member_id text NOT NULL,
    client_id text NOT NULL,
    topics text NOT NULL,
    session_timeout_ms bigint NOT NULL,
    PRIMARY KEY (group_name, member_id)
);

-- State: what is not an event.
CREATE TABLE session_leases (
    session_id text PRIMARY KEY,
    expires_ms bigint NOT NULL,
    grants_version bigint NOT NULL
);
CREATE TABLE buffer_claims (
    buffer_id text PRIMARY KEY,
    wal_id text NOT NULL,
    sealed_position bigint NOT NULL,
    size_bytes bigint NOT NULL,
    trace_context text NOT NULL,
    claim_id text NOT NULL,
    worker_id text NOT NULL,
    free_at_ms bigint NOT NULL,
    attempt bigint NOT NULL,
    last_reason text NOT NULL
);
CREATE INDEX buffer_claims_oldest ON buffer_claims (sealed_position);
CREATE INDEX buffer_claims_claim ON buffer_claims (claim_id) WHERE claim_id <> '';
CREATE TABLE compaction_claims (
    topic_id text NOT NULL,
    partition bigint NOT NULL,
    claim_id text NOT NULL,
    worker_id text NOT NULL,
    expires_ms bigint NOT NULL,
    PRIMARY KEY (topic_id, partition)
);
CREATE TABLE producer_snapshots (
    topic_id text NOT NULL,
    partition bigint NOT NULL,
    epoch bigint NOT NULL,
    end_offset bigint NOT NULL,
    snapshot bytea NOT NULL,
    PRIMARY KEY (topic_id, partition, epoch, end_offset)
);
CREATE TABLE lost_spans (
    topic_id text NOT NULL,
    partition bigint NOT NULL,
    epoch bigint NOT NULL,
    base_offset bigint NOT NULL,
    end_offset bigint NOT NULL,
    reason text NOT NULL,
    PRIMARY KEY (topic_id, partition, epoch, base_offset)
);
CREATE TABLE group_member_state (
    group_name text NOT NULL,
    member_id text NOT NULL,
    expires_ms bigint NOT NULL,
    owned text NOT NULL,
    complete boolean NOT NULL,
    PRIMARY KEY (group_name, member_id)
);
CREATE INDEX group_member_state_expiry ON group_member_state (expires_ms);
CREATE TABLE group_offsets (
    group_name text NOT NULL,
    topic_id text NOT NULL,
    partition bigint NOT NULL,
    next_offset bigint NOT NULL,
    metadata text NOT NULL,
    committed_ms bigint NOT NULL,
    PRIMARY KEY (group_name, topic_id, partition)
);
CREATE INDEX group_offsets_of_topic ON group_offsets (topic_id);
