"""Continuous queries: their statements, plans and programs. Pure: DuckDB runs what is written here (pipeline.py)."""
