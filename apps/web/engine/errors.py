"""Errors of the engine that diagnoses single images."""

from __future__ import annotations

from leukoflow.core.errors import LeukoflowError


class BusyError(LeukoflowError):
    """The queue is full; `retry_after` is in seconds."""

    def __init__(self, words: str, retry_after: int) -> None:
        super().__init__(words)
        self.retry_after = retry_after


class EngineError(LeukoflowError):
    """The engine cannot answer: it is not started, closed, or its workers do not start."""


class DeathError(Exception):
    """A worker ended, hangs, or sends what is no frame; the message says how."""
