"""Batches of tiles: a member keeps its slot."""

from __future__ import annotations

import numpy as np

from leukoflow.tasks.inference.blocks import inference_batches


def test_members_keep_their_slot_whichever_are_missing() -> None:
    everybody = inference_batches(np.arange(16, 24, dtype=np.int32), 4)
    assert everybody == ((0, 1, 2, 3), (4, 5, 6, 7))
    without_18_and_20 = inference_batches(np.array([16, 17, 19, 21, 22, 23], np.int32), 4)
    assert without_18_and_20 == ((0, 1, -1, 2), (-1, 3, 4, 5))


def test_a_large_member_fills_batches_of_its_own() -> None:
    owners = np.array([16, 17, 17, 17, 17, 17, 18], np.int32)
    assert inference_batches(owners, 4) == ((0, -1, 6, -1), (1, 2, 3, 4), (5, -1, -1, -1))
    assert inference_batches(np.zeros(0, np.int32), 4) == ()
