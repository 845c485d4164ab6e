-- Which history of the events this is: a restore from a backup begins another one. Agents and followers compare it with
-- the one they know, so that metadata that went back in time is noticed.
CREATE TABLE histories (
    nth bigint PRIMARY KEY,
    history_id text NOT NULL UNIQUE,
    from_position bigint NOT NULL,
    producer_ids_from bigint NOT NULL,
    created_ms bigint NOT NULL
);
INSERT INTO histories VALUES (1, gen_random_uuid()::text, 0, 0, (extract(epoch from clock_timestamp()) * 1000)::bigint);
