"""What happens to finished runs: verify, reproduce, compare, amend, erase, retain."""
