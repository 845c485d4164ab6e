-- Until when one coordinator publishes, and the others do not. Before, it held the row in an open transaction.
ALTER TABLE outbox ADD COLUMN claimed_until_ms bigint NOT NULL DEFAULT 0;
