"""Where a run writes: apart from its source, and where this user may write."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

from leukoflow.core.errors import ConfigError
from leukoflow.runs.layout import RunKey
from leukoflow.runs.records import Source, SourceKind
from leukoflow.storage.base import Storage
from leukoflow.storage.opening import open_storage


def require_apart(source: Source, out: str) -> None:
    """Raise ConfigError for an output inside the source: it would change what the source is while it is read."""
    storage = open_storage(out)
    if source.kind is not SourceKind.DIRECTORY or storage.is_local != ("://" not in source.uri):
        return
    inside = Path(source.uri).absolute() if storage.is_local else PurePosixPath(source.uri)
    if PurePosixPath(storage.root) == inside:
        raise ConfigError(f"--out {out} is the source itself; choose a place outside of it")
    if PurePosixPath(storage.root).is_relative_to(inside):
        raise ConfigError(f"--out {out} lies inside the source {source.uri}; choose a place outside of it")
    if not storage.is_local or not inside.is_relative_to(storage.root):
        return
    top = Path(storage.root)
    for folder in (Path(inside), *Path(inside).parents):
        if folder != top and folder.is_relative_to(top) and (folder / RunKey.BINDING).is_file():
            raise ConfigError(f"{source.uri} lies inside the results of run {folder.name}; name the images themselves")


def require_writable(storage: Storage) -> None:
    """Make a run's folder. Raises ConfigError where none can be made, or nothing can be written into it."""
    if not storage.is_local:
        return
    folder = Path(storage.root)
    in_the_way = next((p for p in (folder, *folder.parents) if p.exists() and not p.is_dir()), None)
    if in_the_way is not None:
        raise ConfigError(f"--out: {in_the_way} is a file; name a folder, new or existing")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--out: the folder {folder} cannot be made ({error.strerror}); name one where this user may write"
        ) from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(
            f"--out: {folder} cannot be written by this user; change its permissions, or name another one"
        )
