-- Up to where a log had announced buffers that it did not have any more when it was opened again: the range waits for
-- them, or for an operator to give them up.
ALTER TABLE ranges ADD COLUMN acknowledged_end bigint;
