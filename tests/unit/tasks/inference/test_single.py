"""One image alone: what the nightly run would write about it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from harness import ROOT, arrays, screen_here, small_bundle, smears, table, white, write_zip

from leukoflow.core.config import LimitSettings
from leukoflow.models.bundle import Bundle
from leukoflow.runs.records import CLASSES, Status
from leukoflow.runs.schema import CELLS
from leukoflow.tasks.decoding.ingest import Decoder
from leukoflow.tasks.inference import single
from leukoflow.tasks.inference.single import STAGES, Examination, Models, careful, examine, load_models, shape_for

LIMITS = LimitSettings(max_member_mb=8)
PHOTO, MOSAIC = 0.42 * 224 / 600, 0.42 * 224 / 1024
SCALES = {
    "scaled/fine.jpg": 0.21,
    "scaled/coarse.jpg": 0.84,
    "large/photo.jpg": PHOTO,
    "large/wide.png": PHOTO,
    "large/mosaic.jpg": MOSAIC,
}
"""What is stated; of all others 0.42. Beside others an image has their scale, alone its own."""


def red_cells() -> bytes:
    """A field that is fit for diagnosis, without a white cell."""
    rgb = np.full((224, 224, 3), (246, 248, 244), np.uint8)
    rng = np.random.default_rng(0)
    for x, y in rng.integers(10, 214, (40, 2)).tolist():
        cv2.circle(rgb, (x, y), 8, (170, 190, 222), -1)
    return cv2.imencode(".png", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR))[1].tobytes()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return small_bundle(tmp_path_factory.mktemp("bundles") / "small")


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Every kind of member and of way through."""
    folder = tmp_path_factory.mktemp("sample")
    fields = smears(folder / "a", 6, seed=3)
    (photo,) = smears(folder / "b", 1, seed=4, side=600).values()
    (mosaic,) = smears(folder / "c", 1, seed=5, side=1500).values()
    wide = cv2.imdecode(np.frombuffer(photo, np.uint8), cv2.IMREAD_COLOR)[:400]
    first, *_ = fields.values()
    return fields | {
        "large/photo.jpg": photo,
        "large/wide.png": cv2.imencode(".png", wide)[1].tobytes(),
        "large/mosaic.jpg": mosaic,
        "scaled/fine.jpg": first,
        "scaled/coarse.jpg": photo,
        "bad/blank.png": white(),
        "bad/cut.jpg": first[:700],
        "bad/empty.jpg": b"",
        "bad/notes.txt": b"nothing to see here",
        "bad/no-white-cell.png": red_cells(),
    }


@pytest.fixture(scope="module")
def run(members: dict[str, bytes], bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The batch over the same members."""
    folder = tmp_path_factory.mktemp("run")
    lines = ["image_key,um_per_px", *(f"{name},{SCALES.get(name, 0.42)}" for name in members)]
    (folder / "scales.csv").write_text("\n".join(lines))
    source = write_zip(folder / "ward.zip", members)
    screen_here(source, folder / "out", "r", bundle, shard_size=32, manifest=str(folder / "scales.csv"))
    return folder / "out" / "r"


@pytest.fixture(scope="module")
def models(bundle: Bundle) -> Models:
    return load_models(str(bundle.path))


@pytest.fixture(scope="module")
def decoder(bundle: Bundle) -> Iterator[Decoder]:
    with Decoder(LIMITS, bundle.spec.method.segment) as shared:
        yield shared


def look(models: Models, decoder: Decoder, data: bytes, um_per_px: float | None = 0.42) -> Examination:
    return examine(data, um_per_px, models, LIMITS, decoder, lambda stage: None)


@pytest.fixture(scope="module")
def findings(members: dict[str, bytes], models: Models, decoder: Decoder) -> dict[str, Examination]:
    return {name: look(models, decoder, data, SCALES.get(name, 0.42)) for name, data in members.items()}


def test_every_status_is_there(findings: dict[str, Examination]) -> None:
    """Or the comparison below would say little."""
    assert {f.status for f in findings.values()} >= {Status.REJECTED, Status.QUARANTINED, Status.ABSTAINED}
    assert any(f.status is Status.PREDICTED for f in findings.values())
    assert len(findings["large/mosaic.jpg"].tiles) > 1
    assert len(findings["scaled/coarse.jpg"].tiles) > 1
    assert findings["bad/no-white-cell.png"].reason == "too few cells: 0 < 1"


def kind(reason: str | None) -> str | None:
    """A reason; of a scale that red cells contradict without what they say, since neighbours have a say in a run."""
    return "scale contradicted" if reason is not None and reason.startswith("scale contradicted: ") else reason


def test_rows_are_those_of_the_run(findings: dict[str, Examination], run: Path, bundle: Bundle) -> None:
    rows = {row["image_key"]: row for row in table(run, "predictions").to_pylist()}
    assert list(rows) == list(findings)
    for name, found in findings.items():
        row = rows[name]
        assert (str(found.status), found.label) == (row["status"], row["label"]), name
        assert kind(found.reason) == kind(row["reason"]), name
        assert found.scale.um_per_px == row["um_per_px"], name
        assert (found.width_px or None, found.height_px or None) == (row["width_px"], row["height_px"]), name
        assert row["member_sha256"] in (found.sha256, None), name  # of an empty member the plan already knows
        assert found.bundle_digest == row["bundle_digest"] == bundle.digest
        assert list(found.prediction_set) == (row["prediction_set"] or []), name
        assert (found.quality and found.quality.focus) == row["focus"], name
        assert (None if found.cells is None else len(found.cells)) == row["n_cells"], name
        if found.label is None:
            assert found.probabilities == ()
            continue
        expected = [row[f"prob_{c.lower()}"] for c in CLASSES]
        np.testing.assert_allclose(found.probabilities, expected, atol=1e-5)
        assert found.ood == pytest.approx(row["ood_score"], abs=1e-4)


def test_cells_are_those_of_the_run(findings: dict[str, Examination], run: Path) -> None:
    stored = table(run, "cells")
    first = dict(zip(*_first_tiles(run), strict=True))
    for name, found in findings.items():
        if found.cells is None:
            continue
        own = stored.filter(np.array(stored["image_key"].to_pylist(), object) == name)
        assert found.cells.schema.equals(CELLS)
        assert found.cells["cell_id"].to_pylist() == list(range(1, len(own) + 1))
        assert {*found.cells["image_key"].to_pylist(), *found.cells["run_id"].to_pylist()} <= {""}
        for column in CELLS.names[2:-2]:
            assert found.cells[column].to_pylist() == own[column].to_pylist(), (name, column)
        np.testing.assert_allclose(found.cells["attention"].to_numpy(), own["attention"].to_numpy(), atol=1e-5)
        tiles = np.asarray(found.cells["zarr_index"].to_pylist(), int) + first[name]
        assert tiles.tolist() == own["zarr_index"].to_pylist()


def _first_tiles(run: Path) -> tuple[list[str], list[int]]:
    rows = [r for r in table(run, "predictions").to_pylist() if r["zarr_index"] is not None]
    return [r["image_key"] for r in rows], [r["zarr_index"] for r in rows]


def test_pictures_are_those_of_the_run(findings: dict[str, Examination], run: Path) -> None:
    (semantic,) = arrays(run, "masks.zarr", "semantic")
    (cells,) = arrays(run, "masks.zarr", "cells")
    (to_source,) = arrays(run, "masks.zarr", "to_source")
    (maps,) = arrays(run, "activations.zarr", "maps")
    (offsets,) = arrays(run, "features.zarr", "cell_offsets")
    for name, first in zip(*_first_tiles(run), strict=True):
        for t, view in enumerate(findings[name].tiles):
            height, width = view.semantic.shape
            assert view.original.shape == view.normalized.shape == (height, width, 3)
            for mine, theirs in ((view.semantic, semantic), (view.cells, cells)):
                assert np.array_equal(mine, theirs[first + t, :height, :width]), name
                assert not theirs[first + t, height:].any()
                assert not theirs[first + t, :, width:].any()
            assert np.array_equal(view.to_source, to_source[first + t])
            assert view.cell_ids.tolist() == sorted(set(view.cells[view.cells > 0].tolist()))
            own = slice(offsets[first + t], offsets[first + t + 1])
            np.testing.assert_allclose(view.maps.astype(float), maps[own].astype(float), atol=2e-3)
            for x, y, cell in zip(view.field_x, view.field_y, view.cell_ids, strict=True):
                ys, xs = np.nonzero(view.cells == cell)
                assert (x, y) == pytest.approx((xs.mean(), ys.mean()), abs=1e-3)


def test_an_image_that_is_wider_than_high_is_shown_without_what_was_mirrored(findings: dict[str, Examination]) -> None:
    (view,) = findings["large/wide.png"].tiles
    assert view.original.shape == (149, 224, 3)


def test_a_rejected_image_can_be_looked_at(findings: dict[str, Examination]) -> None:
    found = findings["bad/blank.png"]
    assert found.status is Status.REJECTED
    assert found.quality is not None
    (view,) = found.tiles
    assert view.original.shape == (224, 224, 3)
    assert len(view.cell_ids) == len(view.maps) == 0
    assert found.cells is None


def test_stages_are_announced_and_timed(members: dict[str, bytes], models: Models, decoder: Decoder) -> None:
    heard: list[str] = []
    found = examine(next(iter(members.values())), None, models, LIMITS, decoder, heard.append)
    assert tuple(heard) == STAGES
    assert tuple(stage for stage, _ in found.seconds) == STAGES
    assert all(seconds >= 0 for _, seconds in found.seconds)
    heard.clear()
    refused = examine(b"no image", None, models, LIMITS, decoder, heard.append)
    assert heard == ["decode"]
    assert refused.reason == "not an image: text"


def test_an_announcement_can_end_it(members: dict[str, bytes], models: Models, decoder: Decoder) -> None:
    def announce(stage: str) -> None:
        if stage == "extract":
            raise InterruptedError

    with pytest.raises(InterruptedError):
        examine(next(iter(members.values())), None, models, LIMITS, decoder, announce)


def test_too_many_bytes_are_not_decoded(models: Models, decoder: Decoder) -> None:
    found = look(models, decoder, b"\xff\xd8\xff" + bytes(9 << 20))
    assert found.status is Status.QUARANTINED
    assert found.reason == "too large: 9,437,187 bytes, the limit is 8,388,608"
    assert found.seconds[0][0] == "decode"


def test_of_very_large_images_the_most_attended_tiles_are_shown(
    members: dict[str, bytes], models: Models, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = members["large/mosaic.jpg"]
    whole = look(models, decoder, data, MOSAIC)
    monkeypatch.setattr(single, "MAX_VIEWS", 2)
    found = look(models, decoder, data, MOSAIC)
    assert found.probabilities == whole.probabilities
    assert found.remarks == (f"pictures of the 2 of {len(whole.tiles)} tiles that were attended to most",)
    assert found.cells is not None
    weight = np.zeros(len(whole.tiles))
    np.add.at(weight, found.cells["zarr_index"].to_numpy(), found.cells["attention"].to_numpy())
    best = sorted(np.argsort(-weight, kind="stable")[:2].tolist())
    shown = [view.to_source.tolist() for view in found.tiles]
    assert shown == [whole.tiles[i].to_source.tolist() for i in best]


class Wavering(torch.nn.Module):
    """Two classes whose distance in one pixel hangs on the size of the batch, as last digits do."""

    def __init__(self, apart: float) -> None:
        super().__init__()
        self.apart, self.sizes = apart, list[int]()

    def forward(self, rgb: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(rgb))
        logits = torch.zeros(len(rgb), 2, *rgb.shape[2:])
        logits[:, 0] = 1.0
        logits[:, 1, 3, 3] = 1.0 + (self.apart if len(rgb) == 4 else -self.apart)
        return logits


@pytest.mark.parametrize(("apart", "sizes", "answer"), [(1e-6, [1, 4], 1), (1e-2, [1], 0)])
def test_a_field_with_a_doubtful_pixel_is_seen_as_in_the_batch(apart: float, sizes: list[int], answer: int) -> None:
    network = Wavering(apart)
    field = torch.zeros(1, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    seen = careful(network, 4)(field)
    assert network.sizes == sizes
    assert seen.shape == (1, 2, 8, 8)
    assert int(seen.argmax(1)[0, 3, 3]) == answer


@pytest.mark.parametrize(
    ("count", "most", "size"),
    [(0, 64, 1), (1, 64, 1), (9, 64, 12), (17, 64, 24), (64, 64, 64), (70, 64, 64), (3, 2, 2)],
)
def test_batches_are_as_small_as_they_can_be(count: int, most: int, size: int) -> None:
    assert shape_for(count, most) == size


def test_a_web_server_that_shows_findings_needs_no_torch() -> None:
    code = (
        "import sys, leukoflow.tasks.inference.single, leukoflow.apps.web.engine.engine;"
        "print(any(m in sys.modules for m in ('torch', 'distributed')))"
    )
    done: Any = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "False"
