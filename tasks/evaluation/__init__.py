"""Evaluation without leakage: protocols, baselines, probes, statistics."""
