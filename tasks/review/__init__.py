"""What people read and say of results: the worklist, fields, verdicts, exports, and the wording of all of it."""
