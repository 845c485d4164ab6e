-- Agents that the workers cannot reach, and those that could not be reached once: their leaderships go to others.
CREATE TABLE cut_offs (
    agent_id text PRIMARY KEY,
    session_id text NOT NULL,
    reporters text NOT NULL,
    since_ms bigint NOT NULL,
    times bigint NOT NULL,
    reachable_ms bigint NOT NULL
);
-- What workers say of agents that one of them cannot reach; most often there is nothing here.
CREATE TABLE reach_reports (
    session_id text NOT NULL,
    agent_session_id text NOT NULL,
    reached boolean NOT NULL,
    since_ms bigint NOT NULL,
    reported_ms bigint NOT NULL,
    PRIMARY KEY (session_id, agent_session_id)
);
