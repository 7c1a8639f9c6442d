"""Zip and tar archives in bounded memory, damaged ones too. Knows nothing of images or runs."""
