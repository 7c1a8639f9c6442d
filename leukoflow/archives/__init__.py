"""Zip and tar archives in bounded memory, damaged ones too. Imports nothing of leukoflow."""
