"""Adapters to PostgreSQL and RabbitMQ, and the store in memory for tests."""
