"""Workers of continuous queries: a job is run in micro-batches, each exactly once, by the worker that holds it."""
