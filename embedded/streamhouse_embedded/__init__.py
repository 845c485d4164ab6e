"""All services by one command, over an embedded PostgreSQL and a local directory: one command, no set-up."""
