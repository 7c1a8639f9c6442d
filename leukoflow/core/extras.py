"""Which extra of the package brings a module that is not installed."""

from __future__ import annotations

_RUN = ("prefect", "dask", "distributed", "torch", "torchvision", "timm", "sklearn", "safetensors", "prometheus_client")
_WEB = ("fastapi", "starlette", "uvicorn", "python_multipart", "argon2", "fpdf")
_EXTRAS = dict.fromkeys(_RUN, "run") | dict.fromkeys(_WEB, "web")


def how_to_install(error: ModuleNotFoundError) -> str:
    """Say which extra brings the module that was not found; empty where none does.

    >>> how_to_install(ModuleNotFoundError("No module named 'torch.nn'", name="torch.nn"))
    "torch is not installed: pip install 'leukoflow[run]'"
    >>> how_to_install(ModuleNotFoundError("No module named 'mine'", name="mine"))
    ''
    """
    module = (error.name or "").partition(".")[0]
    extra = _EXTRAS.get(module)
    return f"{module} is not installed: pip install 'leukoflow[{extra}]'" if extra else ""
