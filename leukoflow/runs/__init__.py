"""What a run is on disk: its keys, records, schemas, receipts, progress, ledger, locks and logs."""
