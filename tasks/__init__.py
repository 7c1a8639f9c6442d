"""Stages of the workflow: one stage, one file; pure functions first, the thin stage below."""
