"""Backup and restore: Prefect's database, the finished runs, the ledger of the inbox, and the bundle registry.

A backup is a folder `DEST/TIME`. Finished runs that have not changed since the last backup are hard links to it, so a
nightly backup costs what the night has written. Runs that are not finished are left out: their source is still in the
inbox, and what they have done is done again. An object store is not copied: it has versions and replicas of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from infra.postgres import dump, find_binaries, restore
from infra.processes import StackError
from leukoflow.runs.layout import RunKey

_DUMP, _RESULTS, _BUNDLES, _RECORD = "prefect.dump", "results", "bundles", "backup.json"


@dataclass(frozen=True, slots=True)
class Backup:
    """What a backup holds; `backup.json`, written last: a folder without it is no backup."""

    made_at: str
    dump_sha256: str
    runs: dict[str, str]  # finished runs, and the SHA-256 of their manifest
    unfinished: tuple[str, ...]  # runs that were left out


def create(dest: Path, url: str, out: Path | None, bundles: Path | None = None) -> tuple[Path, Backup]:
    """Make a backup below `dest` and return its folder. `out` and `bundles` are None where a store keeps them.

    Raises StackError; what was written by then is deleted.
    """
    dest.mkdir(parents=True, exist_ok=True, mode=0o700)
    earlier = _latest(dest)
    made_at = datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%SZ")
    folder, draft = dest / made_at, dest / f".{made_at}.part"
    draft.mkdir(mode=0o700)
    try:
        dump(find_binaries(), url, draft / _DUMP)
        runs, unfinished = ({}, ()) if out is None else _copy_results(out, draft / _RESULTS, earlier)
        if bundles is not None and bundles.is_dir():
            shutil.copytree(bundles, draft / _BUNDLES)
        backup = Backup(made_at, _sha256(draft / _DUMP), runs, unfinished)
        (draft / _RECORD).write_text(json.dumps(asdict(backup), indent=1), encoding="utf-8")
        draft.rename(folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return folder, backup


def read(folder: Path) -> Backup:
    """Return a backup's record, after its dump was held against it. Raises StackError."""
    try:
        table = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        backup = Backup(table["made_at"], table["dump_sha256"], dict(table["runs"]), tuple(table["unfinished"]))
    except (OSError, ValueError, KeyError, TypeError):
        raise StackError(f"{folder} is no backup: it has no readable {_RECORD}") from None
    if _sha256(folder / _DUMP) != backup.dump_sha256:
        raise StackError(f"{folder / _DUMP} is damaged: its SHA-256 is not the one that {_RECORD} has")
    return backup


def put_back(folder: Path, url: str, out: Path | None, bundles: Path | None = None) -> Backup:
    """Restore into an empty database and empty folders. Afterwards: migrations, then `leukoflow verify OUT`."""
    backup = read(folder)
    for target in (out, bundles):
        if target is not None and target.is_dir() and any(target.iterdir()):
            raise StackError(f"{target} is not empty: restore into a new folder, or move it away")
    restore(find_binaries(), url, folder / _DUMP)
    for name, target in ((_RESULTS, out), (_BUNDLES, bundles)):
        if target is not None and (folder / name).is_dir():
            shutil.copytree(folder / name, target, dirs_exist_ok=True)
    return backup


def _copy_results(out: Path, target: Path, earlier: Path | None) -> tuple[dict[str, str], tuple[str, ...]]:
    """Copy finished runs, and everything in OUT that is no run: the ledger, the audit log."""
    runs: dict[str, str] = {}
    unfinished = []
    target.mkdir()
    for entry in sorted(out.iterdir()):
        if not (entry / RunKey.BINDING).is_file():
            if entry.is_dir():
                shutil.copytree(entry, target / entry.name)
            else:
                shutil.copy2(entry, target / entry.name)
            continue
        if not (entry / RunKey.MANIFEST).is_file():
            unfinished.append(entry.name)
            continue
        digest = _sha256(entry / RunKey.MANIFEST)
        before = None if earlier is None else earlier / _RESULTS / entry.name
        same = before is not None and (before / RunKey.MANIFEST).is_file()
        if same and before is not None and _sha256(before / RunKey.MANIFEST) == digest:
            shutil.copytree(before, target / entry.name, copy_function=os.link)
        else:
            shutil.copytree(entry, target / entry.name)
        runs[entry.name] = digest
    return runs, tuple(unfinished)


def _latest(dest: Path) -> Path | None:
    made = sorted(p.parent for p in dest.glob(f"*/{_RECORD}"))
    return made[-1] if made else None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as source:
            while block := source.read(1 << 20):
                digest.update(block)
    except FileNotFoundError:
        raise StackError(f"{path} is gone") from None
    return digest.hexdigest()


def _places() -> tuple[str, Path | None, Path | None]:
    """Return database, results and bundle registry of this host, as its services have them."""
    from leukoflow.core.site import load_site

    url = os.environ.get("PREFECT_SERVER_DATABASE_CONNECTION_URL")
    if not url:
        raise StackError("PREFECT_SERVER_DATABASE_CONNECTION_URL is not set: give the server's environment")
    out, bundles = (None if not place or "://" in place else Path(place) for place in (load_site().out, _registry()))
    return url, out, bundles


def _registry() -> str | None:
    return os.environ.get("LEUKOFLOW_BUNDLES")


def main(arguments: list[str]) -> int:
    """Run `python -m infra.backup create DEST` or `python -m infra.backup restore DEST/TIME`."""
    from leukoflow.core.errors import LeukoflowError

    try:
        match arguments:
            case ["create", dest]:
                folder, backup = create(Path(dest), *_places())
                left = f"; not finished and left out: {', '.join(backup.unfinished)}" if backup.unfinished else ""
                print(f"{folder}: the database and {len(backup.runs)} runs{left}")
            case ["restore", source]:
                backup = put_back(Path(source), *_places())
                print(f"restored the database and {len(backup.runs)} runs as of {backup.made_at}")
                print("next: prefect server database upgrade --yes, start the services, leukoflow verify OUT")
            case _:
                print("usage: python -m infra.backup create DEST | restore DEST/TIME")
                return 1
    except LeukoflowError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
