"""A finished run with everything in it, for the tests of what happens to a run afterwards."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import screen_here, small_bundle, smears, white, write_zip

from leukoflow.models.bundle import Bundle
from leukoflow.tasks.intake.binding import Run

KEY = "a key that only these tests have"


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Some stages bind torch to one thread; runs record how many there were, so each test finds the same number."""
    import torch

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return small_bundle(tmp_path_factory.mktemp("bundles") / "small")


@pytest.fixture(scope="session")
def night(small: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Three shards: fields of three slides and two patients, bad images, a mix-up of patients, and a missing image."""
    folder = tmp_path_factory.mktemp("night")
    fields = smears(folder / "sample", 34, seed=3)
    names = list(fields)
    members = {f"ward-{i % 3}/{i:02d}.jpg": fields[name] for i, name in enumerate(names)}
    members |= {
        "ward-0/cut.jpg": fields[names[0]][:700],
        "ward-1/blank.png": white(),
        "ward-2/notes.txt": b"nothing to see here",
        "ward-2/twin.jpg": fields[names[0]],
    }
    lines = ["image_key,slide_id,patient_id,site,um_per_px,ward"]
    for i, name in enumerate([*members, "ward-2/absent.jpg"]):
        slide = int(name[5])
        lines.append(f"{name},S{slide},{'mary' if slide == 0 else 'jane'},north,0.5,{i}" if slide < 2 or i % 2 else
                     f"{name},,{'jane'},north,0.5,{i}")  # fmt: skip
    (folder / "slides.csv").write_text("\n".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEUKOFLOW_PATIENT_KEY", KEY)
        yield screen_here(
            write_zip(folder / "night.zip", members), folder / "out", "night", small,
            manifest=str(folder / "slides.csv"), meta_columns=["ward"],
        )  # fmt: skip


@pytest.fixture
def copy(night: Run, tmp_path: Path) -> Path:
    """The finished run once more, to be changed."""
    shutil.copytree(night.root, tmp_path / "out" / "night")
    return tmp_path / "out" / "night"
