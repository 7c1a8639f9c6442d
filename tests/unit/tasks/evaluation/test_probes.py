"""Fields changed on purpose."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from leukoflow.tasks.evaluation.probes import DEGRADATIONS, cells_only, colours_of, moved_bar, painted_out, pasted_bar
from leukoflow.tasks.imaging.overlays import mask_overlays

CENTRE = (110, 110)


def _field(bar: tuple[int, int, int] | None = None, tint: int = 0) -> NDArray[np.uint8]:
    image = np.full((224, 224, 3), 240 - tint, np.uint8)
    for x in range(20, 180, 30):
        cv2.circle(image, (x, 40), 8, (190 - tint, 195, 215), -1, cv2.LINE_AA)
    cv2.circle(image, CENTRE, 16, (140, 70, 190), -1, cv2.LINE_AA)
    if bar is not None:
        cv2.rectangle(image, (196, 212), (218, 213), bar, -1)
        cv2.putText(image, "20", (198, 208), cv2.FONT_HERSHEY_PLAIN, 0.7, bar, 1)
    return image


def _cells() -> NDArray[np.bool_]:
    mask = np.zeros((224, 224), np.uint8)
    cv2.circle(mask, CENTRE, 16, 1, -1)
    return mask > 0


def test_a_bar_is_moved_to_the_other_corner() -> None:
    field = _field((10, 10, 10))
    assert mask_overlays(field)[1][200:, 190:].any()
    moved = moved_bar(field)
    assert moved[:40, :40].min() < 60
    assert moved[190:, 190:].min() > 150
    plain = _field()
    assert moved_bar(plain) is plain


def test_a_bar_of_another_field_is_pasted() -> None:
    found = pasted_bar(_field((10, 10, 10)), _field((200, 10, 10)))
    corner = found[200:, 190:].reshape(-1, 3)
    assert ((corner[:, 0] > 150) & (corner[:, 1] < 80)).any()
    assert not (corner.max(1) < 60).any()


def test_colours_of_another_field() -> None:
    own, donor = _field(), _field(tint=60)
    found = colours_of(own, donor)
    assert np.abs(found.mean((0, 1)) - donor.mean((0, 1))).max() < 4
    assert np.abs(own.mean((0, 1)) - donor.mean((0, 1))).max() > 20


def test_cells_painted_out_and_cells_alone() -> None:
    field, cells = _field(), _cells()
    gone = painted_out(field, cells)
    assert gone[cells].min() > 200
    np.testing.assert_array_equal(gone[30:50], field[30:50])
    alone = cells_only(field, cells)
    np.testing.assert_array_equal(alone[cells], field[cells])
    assert alone[30:50].min() == 240


@pytest.mark.parametrize("kind", sorted({d.kind for d in DEGRADATIONS}))
def test_damage_grows_with_severity(kind: str) -> None:
    field = _field()
    mine = sorted((d for d in DEGRADATIONS if d.kind == kind), key=lambda d: d.severity)
    changes = []
    for damage in mine:
        out = damage.apply(field)
        assert out.shape == field.shape
        assert out.dtype == np.uint8
        changes.append(float(np.abs(out.astype(int) - field).mean()))
    assert [d.severity for d in mine] == [1, 2, 3]
    assert 0 < changes[0] < changes[1] < changes[2]
