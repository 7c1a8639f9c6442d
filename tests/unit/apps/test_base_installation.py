"""What works where only the package's own dependencies are installed, and what the others are asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from harness import ROOT

from leukoflow.core.extras import _EXTRAS

WITHOUT = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {sorted([*_EXTRAS, "pandas", "sqlalchemy"])!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
"""
COMMAND = "from leukoflow.apps.cli.main import main; main()"


def python(code: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT + code, *words], env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "extra"), [(["run", "here", "--out", "there"], "run"), (["serve", "{out}", "--port", "0"], "web")]
)
def test_a_command_that_needs_an_extra_names_it(words: list[str], extra: str, tmp_path: Path) -> None:
    done = python(COMMAND, *[word.format(out=tmp_path) for word in words])
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert f"pip install 'leukoflow[{extra}]'" in done.stderr
    assert "bug" not in done.stderr


def test_a_notebook_hears_what_diagnosing_needs() -> None:
    done = python("import leukoflow; leukoflow.diagnose(b'')")
    assert "LeukoflowError: torch is not installed: pip install 'leukoflow[run]'" in done.stderr


@pytest.mark.slow
def test_a_finished_run_is_read_verified_and_reported(copy: Path) -> None:
    for words in (
        ["status", str(copy.parent)],
        ["verify", str(copy.parent), copy.name],
        ["report", str(copy.parent), copy.name],
    ):
        done = python(COMMAND, *words)
        assert done.returncode == 0, done.stderr
    code = f"""
import leukoflow
run = leukoflow.open_run({str(copy)!r})
row = run.predictions.to_table(columns=["image_key", "n_tiles"]).to_pylist()[0]
print(run.predictions.count_rows() == run.manifest.members, len(run.mask(row["image_key"]).cells) == row["n_tiles"])
run.show(row["image_key"])._repr_html_()
"""
    assert python(code).stdout == "True True\n"
