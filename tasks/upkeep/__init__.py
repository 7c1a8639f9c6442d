"""What is done with finished runs: verify, reproduce, compare, erase, correct, retain, shadow; and the audit log."""
