"""Why a picture is not decoded: reasons in words for people, which become the reason of its row."""

from __future__ import annotations


class RefusedError(Exception):
    """Why an image is not decoded, in words for people."""


class MissingError(Exception):
    """Data of the picture are missing or wrong; says what, in words for people."""


class UnreadableError(Exception):
    """Why the pixels are not there, in words for people."""
