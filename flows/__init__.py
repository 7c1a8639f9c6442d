"""The directed graphs of work, each readable from top to bottom."""
