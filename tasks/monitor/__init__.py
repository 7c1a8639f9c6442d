"""Figures over runs and nights: drift, the last nights, Prometheus."""
