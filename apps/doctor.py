"""Checks what a run needs before the night does. Every check is small, changes nothing, and names its remedy."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from leukoflow.core.errors import LeukoflowError

if TYPE_CHECKING:
    from leukoflow.core.config import LimitSettings
    from leukoflow.storage.base import Storage

Verdict = Literal["ok", "warn", "fail"]

MIN_FREE_GB = 5.0
MIN_MEMORY_GB = 4.0
_TESTED: dict[str, tuple[str, str]] = {  # at least, below; as pyproject.toml has it
    "prefect": ("3.8", "3.9"),
    "fastapi": ("0.139", "0.151"),
    "sqlalchemy": ("2.0.40", "2.1"),
    "dask": ("2026.1", ""),
    "distributed": ("2026.1", ""),
    "torch": ("2.6", ""),
    "timm": ("1.0.20", ""),
    "numpy": ("2.0", ""),
    "zarr": ("3.1", ""),
    "pyarrow": ("19", ""),
    "opencv-python-headless": ("4.10", ""),
}


@dataclass(frozen=True, slots=True)
class Check:
    """One check: what was looked at, what was found, and what to do about it (empty when nothing)."""

    name: str
    verdict: Verdict
    found: str
    remedy: str = ""


def diagnose(out: str | None, bundle: str, cluster: str | None, start_prefect: bool) -> list[Check]:
    """Run all checks, in the order in which a run needs what they look at. A check that breaks is a failed check."""
    steps: list[tuple[str, Callable[[], Iterator[Check]]]] = [
        ("python", check_python),
        ("packages", check_packages),
        ("machine", check_machine),
        ("gpu", check_gpu),
        ("bundle", lambda: check_bundle(bundle)),
        ("decoding", check_decoding),
        ("prefect", lambda: check_prefect(start_prefect)),
        ("patient key", check_patient_key),
    ]
    if cluster:
        steps.append(("cluster", lambda: check_cluster(cluster)))
    if out:
        steps.append(("storage", lambda: check_storage(out)))
    checks: list[Check] = []
    for name, step in steps:
        try:
            checks.extend(step())
        except LeukoflowError as error:
            checks.append(Check(name, "fail", str(error)))
        except Exception as error:
            checks.append(Check(name, "fail", f"{type(error).__name__}: {error}", "reinstall with `make install`"))
    return checks


def check_python() -> Iterator[Check]:
    """Say which interpreter this is; the installation itself sees to its version."""
    yield Check("python", "ok", f"{platform.python_version()} at {sys.executable}")


def check_packages() -> Iterator[Check]:
    """Compare installed versions with the range that is known to work."""
    wrong = 0
    for name, (low, high) in _TESTED.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            wrong += 1
            yield Check(name, "fail", "not installed", "run `make install`, which installs the tested set of versions")
            continue
        if not _within(found, low, high):
            wrong += 1
            wanted = f">={low}" + (f",<{high}" if high else "")
            yield Check(
                name, "fail", f"{found}, tested is {wanted}", f"pip install '{name}{wanted}', or `make install`"
            )
    if not wrong:
        yield Check(
            "packages", "ok", ", ".join(f"{name} {version(name)}" for name in ("prefect", "distributed", "torch"))
        )


def _within(found: str, low: str, high: str) -> bool:
    def key(text: str) -> tuple[int, ...]:
        digits = []
        for part in text.split("+")[0].split("."):
            number = "".join(c for c in part if c.isdigit())
            digits.append(int(number) if number else 0)
        return tuple(digits)

    return key(low) <= key(found) and (not high or key(found) < key(high))


def check_machine() -> Iterator[Check]:
    """Look at cores and memory of this machine."""
    import psutil

    from leukoflow.cluster.host import cores

    n = cores()
    yield Check("cores", "ok", f"{n} usable, so {n} local worker{'s' if n > 1 else ''} by default")
    free, total = (psutil.virtual_memory().available / 2**30, psutil.virtual_memory().total / 2**30)
    found = f"{free:.1f} of {total:.1f} GB available"
    if free < MIN_MEMORY_GB:
        yield Check("memory", "warn", found, "close other programs, or use fewer workers (`--workers 1`)")
    else:
        yield Check("memory", "ok", found)


def check_gpu() -> Iterator[Check]:
    """Say what PyTorch can compute on."""
    import torch

    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        yield Check("gpu", "ok", f"{names} (torch {torch.__version__})")
    elif shutil.which("nvidia-smi"):
        yield Check(
            "gpu",
            "warn",
            f"a driver is installed, but torch {torch.__version__} sees no GPU",
            "install the torch wheel for the driver's CUDA version, and check CUDA_VISIBLE_DEVICES",
        )
    else:
        yield Check("gpu", "ok", f"none; the CPU is used (torch {torch.__version__})")


def check_bundle(name: str) -> Iterator[Check]:
    """Check that the bundle loads, and that its weights are those that its digest names."""
    from leukoflow.models.bundle import load_bundle
    from leukoflow.models.registry import VARIABLE, is_reference, opened

    place = name
    if is_reference(name):
        registry = opened(os.environ.get(VARIABLE))
        place = registry.location(registry.resolve(name).digest)
    bundle = load_bundle(place)
    yield Check("bundle", "ok", f"{name}, digest {bundle.digest[:12]}")


def check_decoding() -> Iterator[Check]:
    """Check that the disposable decoding process starts and decodes."""
    import cv2
    import numpy as np

    from leukoflow.core.config import RunConfig
    from leukoflow.core.method import SegmentSettings
    from leukoflow.tasks.decoding.ingest import Decoder

    encoded = cv2.imencode(".png", np.full((64, 64, 3), 200, np.uint8))[1].tobytes()
    limits: LimitSettings = RunConfig.model_fields["limits"].default
    with Decoder(limits, SegmentSettings()) as decoder:
        decoded = decoder.decode([(encoded, None)])[0]
    if decoded.rgb is None:
        yield Check("decoding", "fail", f"a plain PNG was refused: {decoded.reason}", "reinstall with `make install`")
    else:
        yield Check("decoding", "ok", "the separate decoding process works")


def check_patient_key() -> Iterator[Check]:
    """Check that the key of pseudonyms resists guessing; its check value says whether two machines have the same."""
    from leukoflow.tasks.intake.patient_key import (
        KEY_COMMAND,
        KEY_RULE,
        PATIENT_KEY,
        check_value,
        patient_key,
        weakness,
    )

    key = patient_key()
    if key is None:
        why = f"set {PATIENT_KEY} or the Prefect Secret block leukoflow-patient-key"
        yield Check("patient key", "ok", f"none; where a manifest names patients, {why}")
    elif wrong := weakness(key):
        remedy = f"make one with {KEY_COMMAND}: {KEY_RULE}. Pseudonyms made with this key are found with this key alone"
        yield Check("patient key", "fail", f"it can be guessed: {wrong}", remedy)
    else:
        yield Check("patient key", "ok", f"check value {check_value(key)}, the same wherever the key is the same")


def check_prefect(start: bool) -> Iterator[Check]:
    """Check that the Prefect server that a run would use answers, or that one can be started."""
    from leukoflow.apps.prefect_connection import PrefectServerError, configured_api_url, require_server
    from leukoflow.apps.prefect_server import default_home, running_server, start_server

    if url := configured_api_url():
        try:
            require_server(url)
        except PrefectServerError as error:
            found, _, remedy = str(error).partition(": ")
            yield Check("prefect", "fail", found, remedy)
        else:
            yield Check("prefect", "ok", f"{url} answers and lets us in")
        return
    if (server := running_server()) is not None:
        yield Check("prefect", "ok", f"a local server runs at {server.ui_url}")
    elif not start:
        yield Check("prefect", "ok", f"none is running; a run starts its own below {default_home()} (not tried)")
    else:
        server = start_server(keep=False)
        server.stop()
        yield Check("prefect", "ok", f"none is running; a run can start its own below {server.home}")


def check_cluster(address: str) -> Iterator[Check]:
    """Check that something listens at the scheduler's address, or that workers can be asked for."""
    if address in ("local", "slurm", "kubernetes"):
        yield _check_started(address)
        return
    parts = urlsplit(address)
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if parts.scheme not in ("tcp", "tls") or not host or not port:
        yield Check(
            "cluster", "fail", f"{address} is not a scheduler address", "write it as tcp://HOST:8786 or tls://HOST:8786"
        )
        return
    try:
        with socket.create_connection((host, port), timeout=5):
            yield Check("cluster", "ok", f"{address} accepts connections")
    except OSError as error:
        yield Check(
            "cluster",
            "fail",
            f"{address}: {error.strerror or error}",
            "start it with `dask scheduler`, or open the port; without --cluster local processes are used",
        )


def _check_started(kind: str) -> Check:
    """Check what it takes to start workers of that kind from here."""
    import importlib.util
    import shutil

    package = {"slurm": "dask_jobqueue", "kubernetes": "dask_kubernetes"}.get(kind)
    if package is not None and importlib.util.find_spec(package) is None:
        return Check("cluster", "fail", f"{kind} needs a package", f"pip install 'leukoflow[{kind}]'")
    if kind == "slurm" and shutil.which("sbatch") is None:
        return Check("cluster", "fail", "sbatch is not on the PATH", "use a machine that can submit jobs to Slurm")
    return Check("cluster", "ok", f"{kind}: a run can ask for its workers from here")


def check_storage(out: str) -> Iterator[Check]:
    """Check that the destination takes writes, refuses to create a key twice, and has room."""
    from leukoflow.storage.local import is_full
    from leukoflow.storage.opening import open_storage

    storage = open_storage(out)
    existed = not storage.is_local or Path(storage.root).exists()
    key = f"_doctor-{uuid.uuid4().hex[:8]}"
    remedy = "choose another --out, or correct its permissions"
    try:
        storage.probe()
        first, second = storage.create(key, b"1"), storage.create(key, b"2")
        intact = storage.read(key) == b"1"
    except LeukoflowError as error:
        found, words = _halves(str(error))
        yield Check("storage", "fail", found, remedy if storage.is_local and not is_full(found) else words)
        return
    except OSError as error:
        yield Check("storage", "fail", f"{out}: {error}", remedy)
        return
    finally:
        _remove(storage, key, existed)
    if not (first and not second and intact):
        yield Check(
            "storage",
            "fail",
            f"{out} lets an existing key be created again, so two workers could commit one shard",
            "use a local disk or an object store with conditional writes (If-None-Match)",
        )
        return
    yield Check("storage", "ok", f"{out} takes writes and conditional writes")
    if not storage.is_local:
        yield from _check_store(storage, out)
    else:
        folder = Path(storage.root)
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free / 2**30
        if free < MIN_FREE_GB:
            yield Check("disk", "warn", f"{free:.1f} GB free at {out}", "make room: masks and features take most of it")
        else:
            yield Check("disk", "ok", f"{free:.1f} GB free at {out}")


def _check_store(storage: Storage, out: str) -> Iterator[Check]:
    """Check what else a run does on an object store: copies, listings, deletions, looking for unfinished uploads."""
    place = f"_doctor-{uuid.uuid4().hex[:8]}"
    try:
        storage.write(f"{place}/aside/parts/a", b"1")
        part = storage.child(f"{place}/aside").digest("parts/a")
        storage.child(place).promote("aside", [part])
        copied = storage.child(place).intact([part])
        storage.delete(place)
        left = storage.files(place)
    except (LeukoflowError, OSError) as error:
        yield Check("store", "fail", *_halves(str(error)))
        return
    if not copied or left:
        what = "does not copy objects" if not copied else "does not delete objects"
        yield Check("store", "fail", f"{out} {what}", "use another object store")
        return
    yield Check("store", "ok", f"{out} copies, lists and deletes")
    try:
        storage.abort_uploads(place)
    except LeukoflowError as error:
        remedy = "give the rights that the operating guide lists (Object storage), or set a lifecycle rule for them"
        yield Check("uploads", "warn", f"unfinished uploads cannot be listed: {_halves(str(error))[0]}", remedy)


def _halves(message: str) -> tuple[str, str]:
    """Return what was found and the remedy, as our messages separate them."""
    found, _, remedy = message.partition("; ")
    return found, remedy


def _remove(storage: Storage, key: str, existed: bool) -> None:
    try:
        storage.delete(key)
        if not existed:
            os.rmdir(storage.root)  # leave no trace of a folder that was not there
    except (LeukoflowError, OSError):
        return
