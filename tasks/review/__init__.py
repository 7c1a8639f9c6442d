"""What people read and say of results: worklist, fields, verdicts, exports, wording."""
