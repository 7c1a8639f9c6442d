"""What is computed, without Prefect: one room for each purpose, and each imports only from the rooms below it.

From the bottom: imaging, decoding, store, intake, inference, review, monitor, report, publish and training, upkeep and
evaluation. `docs/architecture.md` says what each room holds, and `pyproject.toml` holds imports to it.
"""
