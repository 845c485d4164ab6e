"""All five services in one process, over an embedded PostgreSQL and a local directory: one command, no set-up."""
