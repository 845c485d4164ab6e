"""The PostgreSQL wire protocol: statements of PostgreSQL's clients, answered by the SQL service."""
