"""The manifest of a run as a file on this machine, wherever it is kept."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from leukoflow.core.config import RunConfig
from leukoflow.core.errors import ConfigError, StorageError
from leukoflow.runs.layout import RunKey
from leukoflow.storage.opening import open_storage


@dataclass(frozen=True, slots=True)
class FetchedFile(os.PathLike[str]):
    """A copy on the local disk, which in messages bears the name that the user knows."""

    local: str
    uri: str

    def __fspath__(self) -> str:
        return self.local

    def __str__(self) -> str:
        return self.uri


def wanted_manifest(config: RunConfig) -> str | None:
    """Return where the manifest is; None for a run that has its plan, or takes it from another run."""
    if config.shadow_of is not None:
        return None
    started = config.manifest_sha256 is not None and config.run_id is not None
    if started and open_storage(config.out).child(str(config.run_id)).exists(RunKey.PLAN):
        return None
    return config.manifest


@contextmanager
def fetch_manifest(path: str | None) -> Iterator[Path | FetchedFile | None]:
    """Give the manifest as a local file, for as long as the block lasts. Raises ConfigError where it cannot be read."""
    if path is None or not path.startswith("s3://"):
        yield Path(path) if path else None
        return
    folder, _, name = path.rpartition("/")
    with tempfile.TemporaryDirectory(prefix="leukoflow-manifest-") as scratch:
        copy = Path(scratch) / "manifest"
        try:
            with copy.open("wb") as file:
                for piece in open_storage(folder).pieces(name):
                    file.write(piece)
        except FileNotFoundError:
            raise ConfigError(f"--manifest {path} does not exist: check bucket, key and endpoint") from None
        except StorageError as error:
            raise ConfigError(f"--manifest {error}") from error
        yield FetchedFile(str(copy), path)


def digest_manifest(path: Path | FetchedFile) -> str:
    """Return the SHA-256 of a manifest, in hex. Raises ConfigError where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        what = (
            "is a folder; name the CSV or Parquet file in it"
            if isinstance(error, IsADirectoryError)
            else f"cannot be read: {error.strerror}"
        )
        raise ConfigError(f"--manifest {path} {what}") from None
