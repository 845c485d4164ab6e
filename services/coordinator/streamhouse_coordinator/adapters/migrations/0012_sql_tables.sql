-- Tables that were declared for SQL: columns and types for the values of a topic.
CREATE TABLE sql_tables (
    table_name text PRIMARY KEY,
    table_id text NOT NULL,
    definition text NOT NULL,
    created_ms bigint NOT NULL
);
CREATE TABLE base_sql_tables (LIKE sql_tables, PRIMARY KEY (table_name));
