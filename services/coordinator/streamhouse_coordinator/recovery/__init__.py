"""Disaster recovery: backups of the metadata, restores, and the detection of metadata that went back in time."""
