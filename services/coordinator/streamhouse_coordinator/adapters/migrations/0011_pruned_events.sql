-- Events are pruned: what they made of the projections is kept in the bases, the projections as of the last event that was.
-- Some of what only events told has to be in rows from now on: since when a range has no leader, which topics there were.
ALTER TABLE ranges ADD COLUMN orphaned_ms bigint NOT NULL DEFAULT 0;
UPDATE ranges r SET orphaned_ms = told.created_ms
FROM (
    SELECT DISTINCT ON (topic_id, partition, epoch) topic_id, partition, epoch, created_ms
    FROM (
        SELECT position, created_ms, payload::json ->> 'topic_id' AS topic_id,
            (payload::json ->> 'partition')::bigint AS partition, (payload::json ->> 'epoch')::bigint AS epoch
        FROM events WHERE type = 'RangeOrphaned'
        UNION ALL
        SELECT position, created_ms, payload::json ->> 'topic_id', (payload::json ->> 'partition')::bigint,
            (item ->> 'epoch')::bigint
        FROM events, json_array_elements(payload::json -> 'ranges') item
        WHERE type = 'PartitionRestored' AND item ->> 'status' = 'orphaned'
    ) of_range
    ORDER BY topic_id, partition, epoch, position DESC
) told
WHERE (r.topic_id, r.partition, r.epoch) = (told.topic_id, told.partition, told.epoch);
CREATE TABLE deleted_topics (
    topic_id text PRIMARY KEY,
    topic text NOT NULL,
    deleted_ms bigint NOT NULL
);
INSERT INTO deleted_topics
SELECT payload::json ->> 'topic_id', payload::json ->> 'topic', (payload::json ->> 'deleted_ms')::bigint
FROM events WHERE type = 'TopicDeleted';

CREATE TABLE pruned_position (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    position bigint NOT NULL
);
INSERT INTO pruned_position (position) VALUES (0);
CREATE TABLE base_topics (LIKE topics, PRIMARY KEY (topic_id));
CREATE TABLE base_partitions (LIKE partitions, PRIMARY KEY (topic_id, partition));
CREATE TABLE base_ranges (LIKE ranges, PRIMARY KEY (topic_id, partition, epoch));
CREATE TABLE base_sessions (LIKE sessions, PRIMARY KEY (session_id));
CREATE TABLE base_cut_offs (LIKE cut_offs, PRIMARY KEY (agent_id));
CREATE TABLE base_segments (LIKE segments, PRIMARY KEY (segment_id));
-- A topic that is deleted takes its segments along.
CREATE INDEX base_segments_of_topic ON base_segments (topic_id);
CREATE TABLE base_groups (LIKE groups, PRIMARY KEY (group_name));
CREATE TABLE base_group_members (LIKE group_members, PRIMARY KEY (group_name, member_id));
CREATE TABLE base_deleted_topics (LIKE deleted_topics, PRIMARY KEY (topic_id));

-- What identifies events that the object store has a mark of, also when they are pruned.
CREATE TABLE history_marks (
    position bigint PRIMARY KEY,
    stream_id text NOT NULL,
    version bigint NOT NULL,
    type text NOT NULL,
    created_ms bigint NOT NULL
);
-- The mark that is in the store now names one of the newest.
INSERT INTO history_marks
SELECT position, stream_id, version, type, created_ms FROM events ORDER BY position DESC LIMIT 9000;
-- When a coordinator that publishes was there last: events are kept for it.
ALTER TABLE outbox ADD COLUMN seen_ms bigint NOT NULL DEFAULT 0;
UPDATE outbox SET seen_ms = (extract(epoch from clock_timestamp()) * 1000)::bigint WHERE position > 0;
-- Sealed buffers are no events any more. Rows from before keep their positions here, which are smaller than any time.
ALTER TABLE buffer_claims RENAME COLUMN sealed_position TO sealed_ms;
