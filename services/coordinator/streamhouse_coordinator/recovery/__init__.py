"""Disaster recovery: backups of the metadata, restores, and the detection of metadata that went back in time.

Terms: the *metadata* is the content of PostgreSQL. A *history* is a sequence of events; a restore begins a new one that
shares the events up to the backup with its ancestors (`histories`). An *unrecovered range* has records that only
agents' logs may hold.

- Backup: `backup` writes the objects, `backup_format` has their bytes.
- Restore: `restore` loads a backup and adopts the segments that `stored_segments` finds in the object store;
  `restore_plan` decides per partition, with `segment_selection` and `unrecovered_ranges`.
- After a restore: `after_restore` gives returning agents the ranges of their logs, until an operator completes the
  restore.
- Detection: `histories` compares, `rollback_detection` records a rollback and stops changes to the log.

Other services have a part in the detection. An ingest agent notes the history and the last position under which its log
was written (`log/history.py` and `adapters/wal_note.py` of streamhouse_ingest), and reports both when it opens a
session. The segmenter keeps a mark of a recent event in the object store (`core/history.py` of streamhouse_segmenter),
and deletes no object while the events do not contain that event.
"""
