"""Settings of the bundle that a run used, from its `bundle.json` alone: without torch, and without its weights."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from leukoflow import models
from leukoflow.core.errors import LeukoflowError
from leukoflow.core.method import MethodSettings, SegmentSettings

DEFAULT_ALPHA = 0.05


def segment_settings(bundle: str) -> SegmentSettings:
    """Return the geometry that a run used; the defaults where its bundle is not here (a misfit is noticed and said)."""
    method = method_of(bundle)
    return SegmentSettings() if method is None else method.segment


@lru_cache(maxsize=16)
def alpha_of(bundle: str) -> float:
    """Return the miss rate that a bundle's prediction sets were built for; the default where the bundle is not here."""
    calibration = (bundle_document(bundle) or {}).get("calibration") or {}
    alpha = calibration.get("alpha", DEFAULT_ALPHA)
    return float(alpha) if isinstance(alpha, int | float) else DEFAULT_ALPHA


@lru_cache(maxsize=16)
def max_ood_of(bundle: str) -> float | None:
    """Return the distance above which a bundle abstains; None where the bundle is not here, or has no such limit."""
    limit = ((bundle_document(bundle) or {}).get("calibration") or {}).get("max_ood")
    return float(limit) if isinstance(limit, int | float) and limit < 1e9 else None


@lru_cache(maxsize=16)
def method_of(bundle: str) -> MethodSettings | None:
    """Return the settings of a bundle, by name or folder; None where it is not here. Its weights are not looked at."""
    document = bundle_document(bundle)
    if document is None:
        return None
    try:
        return MethodSettings.model_validate(document["method"])
    except (KeyError, ValueError):
        return None


def bundle_document(bundle: str) -> dict[str, Any] | None:
    """Return what `bundle.json` says, without torch for a bundle on this machine; None where it cannot be read."""
    path = Path(bundle)
    if not bundle.startswith("s3://"):
        if not (path / "bundle.json").is_file() and path.name == bundle:
            path = Path(models.__file__).parent / "default" / path.name
        try:
            found = json.loads((path / "bundle.json").read_bytes())
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None
    from leukoflow.models.fetch import read_remote

    try:
        found = json.loads(read_remote(bundle))
    except (LeukoflowError, ValueError):
        return None
    return found if isinstance(found, dict) else None
