"""Exports: a run, a slide or a patient as CSV, Parquet or HL7 FHIR, and verdicts as training labels."""
