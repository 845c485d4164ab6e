"""Drivers of the SQL service: DuckDB, Arrow."""
