"""Bundles on an object store: fetched once, into a folder of this machine that is named by the bundle's digest."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from leukoflow.core.errors import BundleError, StorageError
from leukoflow.storage.opening import open_storage

CACHE = "LEUKOFLOW_CACHE"


def cache_folder() -> Path:
    """Return where fetched bundles lie: `LEUKOFLOW_CACHE`, else the user's cache directory. It may be deleted."""
    if chosen := os.environ.get(CACHE):
        return Path(chosen).expanduser() / "bundles"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "leukoflow" / "bundles"


def read_remote(uri: str) -> bytes:
    """Read the `bundle.json` of a bundle at an `s3://` prefix. Raises BundleError where there is none."""
    try:
        return open_storage(uri).read("bundle.json")
    except FileNotFoundError:
        raise BundleError(f"no bundle {uri}: there is no {uri.rstrip('/')}/bundle.json") from None
    except StorageError as error:
        raise BundleError(f"bundle {error}") from error


def fetch(uri: str, document: bytes, names: list[str], target: Path) -> None:
    """Bring `document` and the files `names` of a bundle to `target`, in place of what is there: all of them or none.

    Of several processes that fetch the same bundle at the same time, one wins and the others find its folder. The
    caller checks the digests. Raises BundleError where a file is absent or the store cannot be read.
    """
    storage = open_storage(uri)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".fetching-", dir=target.parent))
    try:
        for name in names:
            with (draft / name).open("wb") as file:
                for piece in storage.pieces(name):
                    file.write(piece)
        (draft / "bundle.json").write_bytes(document)
        draft.chmod(0o755)
        if target.exists():  # what could not be used
            grave = draft.with_name(draft.name + "-old")
            target.rename(grave)
            shutil.rmtree(grave, ignore_errors=True)
        draft.rename(target)
    except FileNotFoundError as error:
        raise BundleError(f"bundle {uri} is incomplete: {error}; copy the whole directory there again") from None
    except StorageError as error:
        raise BundleError(f"bundle {error}") from error
    except OSError as error:
        if not (target / "bundle.json").is_file():  # else another process was faster
            raise BundleError(
                f"bundle {uri} cannot be kept at {target}: {error.strerror}; set {CACHE} to a folder with room"
            ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
