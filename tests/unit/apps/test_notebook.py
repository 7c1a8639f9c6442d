"""What a notebook imports: one image diagnosed as everywhere else, and a finished run opened for reading."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pyarrow.dataset as ds
import pytest
from faults import moto_server, s3_account
from harness import ROOT
from PIL import Image

import leukoflow
from leukoflow.apps.notebook.diagnosis import Diagnosis, _opened, diagnose
from leukoflow.apps.notebook.pictures import field_html
from leukoflow.apps.notebook.stored import Run, open_run
from leukoflow.apps.notebook.words import sentences
from leukoflow.core.config import LimitSettings
from leukoflow.core.errors import NotFoundError, RequestError, StorageError
from leukoflow.core.geometry import field_geometry
from leukoflow.models.bundle import Bundle, write_spec
from leukoflow.runs.records import CLASS_NAMES, CLASSES
from leukoflow.storage.opening import open_storage
from leukoflow.tasks.inference.single import examine
from leukoflow.tasks.intake.binding import Run as FinishedRun
from leukoflow.tasks.review.bundle_settings import segment_settings
from leukoflow.tasks.review.wording import CLASS_CAUTION, NO_ANSWER, RESEARCH_USE, SCALE_CAUTION, Scale


@pytest.fixture(scope="module")
def bundle(small: Bundle) -> Iterator[str]:
    """A bundle that stays opened, with its decoder, while these tests run."""
    yield str(small.path)
    close(str(small.path))


def close(bundle: str) -> None:
    _opened(bundle, "cpu")[1].close()
    _opened.cache_clear()


@pytest.fixture(scope="module")
def opened(night: FinishedRun) -> Run:
    return open_run(night.root)


@pytest.fixture(scope="module")
def rows(opened: Run) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = opened.predictions.to_table().to_pylist()
    return found


def member(night: FinishedRun, key: str) -> bytes:
    with zipfile.ZipFile(Path(night.root).parent.parent / "night.zip") as archive:
        return archive.read(key)


def key_with(rows: list[dict[str, Any]], status: str) -> str:
    return str(next(r["image_key"] for r in rows if r["status"] == status))


# --- one image -------------------------------------------------------------------------------------------------------


def test_a_path_bytes_and_pixels_are_the_same_image(
    night: FinishedRun, rows: list[dict[str, Any]], bundle: str, tmp_path: Path
) -> None:
    with Image.open(io.BytesIO(member(night, key_with(rows, "predicted")))) as image:
        pixels = np.asarray(image.convert("RGB"))
    Image.fromarray(pixels).save(tmp_path / "field.png")
    data = (tmp_path / "field.png").read_bytes()
    models, decoder = _opened(bundle, "cpu")
    one = examine(data, None, models, LimitSettings(), decoder, lambda stage: None)
    found = [diagnose(image, bundle=bundle) for image in (tmp_path / "field.png", str(tmp_path / "field.png"), data)]
    assert {d.sha256 for d in found} == {one.sha256}
    for diagnosis in (*found, diagnose(pixels, bundle=bundle)):
        assert diagnosis.status == one.status
        assert tuple(diagnosis.probabilities.values()) == one.probabilities
        assert one.cells is not None
        assert diagnosis.cells.equals(one.cells)
        assert np.array_equal(diagnosis.masks[0].cells, one.tiles[0].cells)
        assert diagnosis.bundle_digest == models.digest


def test_an_image_is_diagnosed_as_in_a_run(night: FinishedRun, rows: list[dict[str, Any]], bundle: str) -> None:
    row = next(r for r in rows if r["status"] == "predicted")
    found = diagnose(member(night, row["image_key"]), um_per_px=0.5, bundle=bundle)
    assert (found.status, found.label, list(found.prediction_set)) == ("predicted", row["label"], row["prediction_set"])
    assert list(found.probabilities.values()) == pytest.approx([row[f"prob_{c.lower()}"] for c in CLASSES])
    assert found.headline == f"{CLASS_NAMES[row['label']]}, {row['confidence']:.3f}"
    assert "<table" in found._repr_html_()
    assert "<script" not in found._repr_html_()
    assert len(found.cells) == row["n_cells"]


@pytest.fixture(scope="module")
def unsure(
    night: FinishedRun, rows: list[dict[str, Any]], small: Bundle, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Diagnosis]:
    """The diagnosis of a bundle that is never sure enough."""
    path = Path(shutil.copytree(small.path, tmp_path_factory.mktemp("bundles") / "unsure"))
    calibration = small.spec.calibration.model_copy(update={"min_confidence": 1.0})
    write_spec(path, small.spec.model_copy(update={"calibration": calibration}))
    yield diagnose(member(night, key_with(rows, "predicted")), um_per_px=0.5, bundle=str(path))
    close(str(path))


def test_an_abstained_image_shows_no_label_no_set_and_no_bars(unsure: Diagnosis) -> None:
    assert (unsure.status, unsure.label, unsure.prediction_set) == ("abstained", None, ())
    assert max(unsure.probabilities.values()) > 0  # the leaning is there for programs
    assert unsure.reason
    assert unsure.headline == NO_ANSWER
    html = unsure._repr_html_()
    assert "<table" not in html
    assert "<svg" in html  # the picture is there
    assert not any(name in unsure.headline for name in CLASS_NAMES.values())
    assert NO_ANSWER in repr(unsure)


def test_an_abstained_image_of_a_run_shows_no_bars_either(opened: Run, rows: list[dict[str, Any]]) -> None:
    field = opened.show(key_with(rows, "predicted"))
    assert "<table" in field._repr_html_()
    assert field.headline.startswith(CLASS_NAMES[field.row["label"]])
    field = replace(field, row=field.row | {"status": "abstained", "reason": "ambiguous"})
    assert field.headline == NO_ANSWER
    assert "<table" not in field._repr_html_()


@pytest.mark.parametrize(
    ("image", "what"),
    [
        (np.zeros((4, 4), np.uint8), r"pixels are uint8 \[4, 4\]"),
        (np.zeros((4, 4, 4), np.uint8), r"pixels are uint8 \[4, 4, 4\]"),
        (np.zeros((4, 4, 3)), r"pixels are float64 \[4, 4, 3\]"),
    ],
)
def test_other_arrays_are_refused_with_the_remedy(image: Any, what: str) -> None:
    with pytest.raises(RequestError, match=rf"{what}: give uint8 \[height, width, 3\], red first"):
        diagnose(image)


@pytest.mark.parametrize("scale", [0, -0.5, float("nan")])
def test_a_scale_that_is_none_is_refused_with_the_remedy(scale: float) -> None:
    with pytest.raises(RequestError, match=f"um_per_px is {scale}: give micrometres per pixel, such as 0.42, or None"):
        diagnose(b"", um_per_px=scale)


def test_what_comes_from_outside_is_escaped(opened: Run, rows: list[dict[str, Any]]) -> None:
    name = '<img src=x onerror="alert(1)">.jpg'
    shown = "&lt;img src=x onerror=&quot;alert(1)&quot;&gt;.jpg"
    field = opened.show(key_with(rows, "predicted"))
    for html in (
        replace(field, sentences=(f"{name} has changed",))._repr_html_(),
        replace(field, row=field.row | {"status": name})._repr_html_(),
        field_html((), None, name, (name,), {name: 0.5}),
    ):
        assert name not in html
        assert shown in html


def test_no_probability_is_rounded_to_certainty(opened: Run, rows: list[dict[str, Any]]) -> None:
    field = opened.show(key_with(rows, "predicted"))
    sure = replace(field, row=field.row | {"confidence": 0.99996, "prob_benign": 0.99996, "prob_pro": 0.00004})
    assert sure.headline.endswith(", > 0.999")
    html = sure._repr_html_()
    assert "&gt; 0.999" in html
    assert "&lt; 0.001" in html
    assert "1.000" not in html
    assert "0.000" not in html


def test_what_is_said_below_an_answer_and_below_none() -> None:
    guessed = Scale(1000, 1000, None)
    answer = sentences("predicted", None, guessed, ("Pre",), (0.1, 0.1, 0.7, 0.1), 0.05, "run")
    assert answer[0] == SCALE_CAUTION
    assert answer[1].startswith("Prediction set: Pre-B. This excludes no other class: by design")
    assert answer[2:] == (CLASS_CAUTION, RESEARCH_USE)
    for where, remedy in (("run", "--um-per-px"), ("notebook", "um_per_px=...")):
        none = sentences("abstained", "ambiguous: 0.51 < 0.60", guessed, ("Pre",), (0.1, 0.1, 0.7, 0.1), 0.05, where)
        assert none[0] == "No class stands out."
        assert remedy in " ".join(none)
        assert not any(said in " ".join(none) for said in ("Prediction set", "Pre-B"))
        assert none[-1] == RESEARCH_USE


# --- a finished run --------------------------------------------------------------------------------------------------


def test_tables_count_as_the_manifest_says(opened: Run) -> None:
    m = opened.manifest
    assert opened.run_id == "night"
    assert opened.predictions.count_rows() == m.members
    assert opened.cells.count_rows() == m.cells > 0
    for status in ("predicted", "abstained", "rejected", "quarantined"):
        assert opened.predictions.count_rows(filter=ds.field("status") == status) == getattr(m, status)
    slides = opened.slides.to_table()
    assert sum(slides["n_predicted"].to_pylist()) == m.predicted
    assert f"{m.members} images, {m.predicted} predicted" in repr(opened)


def test_masks_have_the_shapes_that_are_documented(opened: Run, rows: list[dict[str, Any]]) -> None:
    key = key_with(rows, "predicted")
    row = opened.row(key)
    mask = opened.mask(key)
    n = row["n_tiles"]
    assert mask.semantic.shape == mask.cells.shape
    assert (mask.semantic.ndim, len(mask.semantic), mask.to_source.shape) == (3, n, (n, 2, 3))
    assert (mask.semantic.dtype, mask.cells.dtype, mask.to_source.dtype) == (np.uint8, np.uint16, np.float32)
    ids = opened.cells.to_table(filter=ds.field("image_key") == key)["cell_id"].to_pylist()
    assert len(ids) == row["n_cells"]
    assert set(np.unique(mask.cells[mask.cells > 0]).tolist()) == set(ids)
    assert set(np.unique(mask.semantic).tolist()) <= {0, 1, 2}
    geometry = field_geometry(
        row["width_px"], row["height_px"], row["um_per_px"], segment_settings(opened.manifest.bundle)
    )
    assert len(geometry.origins) == n
    assert opened.image(key).shape == (geometry.height, geometry.width, 3)  # the whole image, not one tile of it


def test_images_without_masks_and_unknown_ones_are_named(opened: Run, rows: list[dict[str, Any]]) -> None:
    for act in (opened.mask, opened.image, opened.show, opened.row):
        with pytest.raises(NotFoundError, match=r"run night has no image 'ward-9/none.jpg'; the column image_key"):
            act("ward-9/none.jpg")
    for status in ("rejected", "quarantined"):
        row = next(r for r in rows if r["status"] == status)
        with pytest.raises(NotFoundError, match="has no masks: ") as caught:
            opened.mask(row["image_key"])
        assert row["image_key"] in str(caught.value)
        assert row["reason"] in str(caught.value)


def test_pixels_that_are_gone_are_no_picture(night: FinishedRun, copy: Path, rows: list[dict[str, Any]]) -> None:
    """A white picture in their place would be taken for the image."""
    key = key_with(rows, "predicted")
    source = Path(night.root).parent.parent / "night.zip"
    hidden = source.rename(source.with_suffix(".away"))
    try:
        with pytest.raises(NotFoundError, match="can no longer be read"):
            open_run(str(copy)).image(key)
        assert "can no longer be read" in open_run(str(copy)).show(key)._repr_html_()
    finally:
        hidden.rename(source)


@pytest.mark.slow
def test_a_run_on_an_object_store_is_read_as_one_on_a_disk(
    opened: Run, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    key = key_with(rows, "predicted")
    with moto_server() as url:
        for name, value in s3_account(url).items():
            monkeypatch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="lab")
        remote = open_storage("s3://lab/out/night")
        for file in opened.storage.files(""):
            remote.write(file, opened.storage.read(file))
        far = open_run("s3://lab/out/night")
        assert far.predictions.to_table().equals(opened.predictions.to_table())
        assert far.cells.to_table().equals(opened.cells.to_table())
        assert far.slides.to_table().equals(opened.slides.to_table())
        assert np.array_equal(far.mask(key).cells, opened.mask(key).cells)
        assert np.array_equal(far.image(key), opened.image(key))
        assert far.show(key).headline == opened.show(key).headline


def test_what_is_no_finished_run_is_refused(copy: Path) -> None:
    with pytest.raises(StorageError, match="holds no run"):
        open_run(str(copy.parent / "another"))
    (copy / "manifest.json").unlink()
    with pytest.raises(StorageError, match="run night is not finished"):
        open_run(str(copy))


CHILD = """
import signal, sys, time
heard = []
signal.signal(signal.SIGINT, lambda *_: heard.append(1))
print("ready", flush=True)
while not heard:
    time.sleep(0.02)
time.sleep(0.3)  # the shards in work
print("finished", len(heard), flush=True)
"""
NOTEBOOK = f"""
import signal, subprocess, sys
from leukoflow.apps.notebook.launch import follow
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
command = [sys.executable, "-c", {CHILD!r}]
with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as it:
    try:
        follow(it, lambda line: print(line, flush=True))
    except KeyboardInterrupt:
        print("interrupted", it.returncode)
"""


def test_an_interrupt_reaches_the_run_once_and_is_raised_when_it_has_ended() -> None:
    """Also where the whole group is interrupted, as by a terminal."""
    with subprocess.Popen(
        [sys.executable, "-c", NOTEBOOK], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        os.killpg(process.pid, signal.SIGINT)
        assert process.stdout.read() == "finished 1\ninterrupted 0\n"
        assert process.wait(30) == 0


# --- the package -----------------------------------------------------------------------------------------------------


def test_importing_leukoflow_costs_nothing_and_reading_needs_neither_torch_nor_prefect() -> None:
    code = (
        "import sys, leukoflow; heavy = {'torch', 'prefect', 'numpy', 'pyarrow'}; assert not heavy & set(sys.modules)\n"
        "leukoflow.open_run; assert not {'torch', 'prefect'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_public_names_are_those_that_are_listed() -> None:
    assert set(leukoflow.__all__) <= set(dir(leukoflow))
    assert leukoflow.diagnose is diagnose
    assert leukoflow.open_run is open_run
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = leukoflow.nothing  # type: ignore[attr-defined]
