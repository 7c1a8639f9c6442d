"""Why an archive, or one entry of it, cannot be read. The messages are words for people."""

from __future__ import annotations


class ArchiveError(Exception):
    """Base of all errors that reading an archive raises on purpose."""


class SplitArchiveError(ArchiveError):
    """The file is one part of an archive in several; the words follow the name of the file and "is"."""


class EntryError(ArchiveError):
    """One entry of the archive cannot be read, and why."""
