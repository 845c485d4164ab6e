"""Where the coordinator meets PostgreSQL, RabbitMQ and, in tests, plain memory."""
