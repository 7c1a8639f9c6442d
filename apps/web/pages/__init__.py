"""Pages for people, one module for each subject, and what they share."""
