-- Objects that are uploaded and not registered yet: a segment can only be registered in one of these.
CREATE TABLE upload_intents (
    object_key text PRIMARY KEY,
    claim_id text NOT NULL,
    buffer_id text NOT NULL,
    worker_id text NOT NULL,
    declared_ms bigint NOT NULL
);
-- A completed buffer takes its intents along; those of compactions go by their key.
CREATE INDEX upload_intents_of_buffer ON upload_intents (buffer_id);
CREATE INDEX upload_intents_oldest ON upload_intents (declared_ms);
-- Objects that nothing refers to, from being noticed until they are gone from the store.
CREATE TABLE deletions (
    object_key text PRIMARY KEY,
    noticed_ms bigint NOT NULL,
    begun_ms bigint NOT NULL
);
CREATE INDEX deletions_oldest ON deletions (noticed_ms);
