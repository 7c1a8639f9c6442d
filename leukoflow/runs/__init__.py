"""What a run is on disk: its records, schemas, progress, locks and logs."""
