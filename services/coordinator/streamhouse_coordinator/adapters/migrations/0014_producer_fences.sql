-- Producers that fence: the newest epoch of each in a partition, and what older ranges say of the producer.
CREATE TABLE producer_fences (
    topic_id text NOT NULL,
    partition bigint NOT NULL,
    producer_id bigint NOT NULL,
    producer_epoch bigint NOT NULL,
    known_epoch bigint NOT NULL,
    state bytea NOT NULL,
    PRIMARY KEY (topic_id, partition, producer_id)
);
