-- Tables that a continuous query names, as they were when it was created.
ALTER TABLE sql_jobs ADD COLUMN definitions text NOT NULL DEFAULT '[]';
ALTER TABLE base_sql_jobs ADD COLUMN definitions text NOT NULL DEFAULT '[]';
