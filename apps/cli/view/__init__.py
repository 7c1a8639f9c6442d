"""What the command line shows, as rich tables and plain lines."""
