"""What stands in front of every page: accounts, sessions, permissions, limits, the audit log."""
