"""What a run has stored, read and compacted: its tables, and what a slide is."""
