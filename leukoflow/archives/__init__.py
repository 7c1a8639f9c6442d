"""Zip and tar archives in bounded memory, damaged ones too. Knows nothing of what they hold."""
