-- That events of this database's history were seen which are not in it: a standby that lagged was promoted, or an older
-- dump put in its place. Kept, because new events soon take the places of those that are gone.
CREATE TABLE forks (
    history_id text PRIMARY KEY,
    position bigint NOT NULL,
    seen_by text NOT NULL,
    noticed_ms bigint NOT NULL
);
