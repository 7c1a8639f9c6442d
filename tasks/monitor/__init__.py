"""Figures over runs and nights: drift, nights, Prometheus."""
