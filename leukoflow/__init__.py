"""Nightly leukaemia screening of blood smears, and its results in a notebook.

    import leukoflow

    leukoflow.diagnose("field.png")                  # one image: label, cells, masks; shown with its outlines
    run = leukoflow.open_run("out/smears-1f0c63b2")  # a run's tables, masks and images
    leukoflow.run("smears.zip", out="out")           # the same flow as the command `leukoflow run`

Names are imported when they are first used, so `import leukoflow` costs nothing, and reading a run pulls neither torch
nor Prefect. Research use only; not a medical device.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from leukoflow.apps.notebook.diagnosis import Diagnosis, diagnose
    from leukoflow.apps.notebook.launch import run
    from leukoflow.apps.notebook.stored import Run, open_run
    from leukoflow.models.bundle import load_bundle

__version__ = "0.1.0"
__all__ = ["Diagnosis", "Run", "__version__", "diagnose", "load_bundle", "open_run", "run"]

_HOMES = {
    "Diagnosis": "leukoflow.apps.notebook.diagnosis",
    "diagnose": "leukoflow.apps.notebook.diagnosis",
    "Run": "leukoflow.apps.notebook.stored",
    "open_run": "leukoflow.apps.notebook.stored",
    "run": "leukoflow.apps.notebook.launch",
    "load_bundle": "leukoflow.models.bundle",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(_HOMES[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
