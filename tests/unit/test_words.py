"""Four words that read as translated stay rare in code and docs."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORDS = re.compile(r"(?<![a-z])(anew|whoever|told|begun)(?![a-z])", re.IGNORECASE)
TEXT = {".css", ".html", ".ipynb", ".js", ".md", ".py", ".sh", ".svg", ".toml", ".yaml", ".yml"}
EXEMPT = {"CHANGELOG.md", "benchmarks/LOG.md", "tests/unit/test_words.py"}  # records stay as they were written


def test_words_that_read_as_translated_stay_rare() -> None:
    """Say again, anyone, reported or said, and started instead."""
    try:
        listed = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True, stderr=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a checkout")
    found = [
        f"{name}:{number}: {line.strip()}"
        for name in listed.splitlines()
        if name not in EXEMPT and Path(name).suffix in TEXT and (ROOT / name).is_file()
        for number, line in enumerate((ROOT / name).read_text(encoding="utf-8").splitlines(), 1)
        for _ in WORDS.finditer(line)
    ]
    assert len(found) < 20, "\n".join(found)
