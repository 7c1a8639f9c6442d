"""The core of leukoflow: records, schemas, configuration, storage, errors. Imports neither flows, tasks nor models."""

__version__ = "0.1.0"
