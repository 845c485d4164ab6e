-- Producers that writers take over by name: the newest epoch of each.
CREATE TABLE named_producers (
    name text PRIMARY KEY,
    producer_id bigint NOT NULL,
    producer_epoch bigint NOT NULL,
    initialized_ms bigint NOT NULL
);
CREATE TABLE base_named_producers (LIKE named_producers, PRIMARY KEY (name));
