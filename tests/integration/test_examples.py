"""The examples are run as they stand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from harness import ROOT, smears
from nbclient import NotebookClient

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
EXAMPLES = ROOT / "examples"


def program(name: str, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *words], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, check=False, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_one_image(tmp_path: Path) -> None:
    (tmp_path / "field.jpg").write_bytes(next(iter(smears(tmp_path / "sample", 4, seed=2).values())))
    assert str(tmp_path / "field.jpg") in program("one_image.py", str(tmp_path / "field.jpg"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_the_notebook_and_the_run_that_it_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT), "IPYTHONDIR": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setenv("LEUKOFLOW_PREFECT_HOME", str(tmp_path / "prefect"))
    book: Any = nbformat.read(EXAMPLES / "first_look.ipynb", as_version=4)  # type: ignore[no-untyped-call]
    NotebookClient(book, timeout=300, kernel_name="python3").execute()
    shown = [o for cell in book.cells for o in cell.get("outputs", ()) if "text/html" in o.get("data", {})]
    assert sum("<svg" in o["data"]["text/html"] for o in shown) == 2  # the single image, and the field of the run
    (root,) = tmp_path.glob("*/out/first-look")
    assert "16 images" in program("read_a_run.py", str(root))
