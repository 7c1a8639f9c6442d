"""Boxes against boxes."""

from __future__ import annotations

import numpy as np

from leukoflow.tasks.evaluation.segmentation import matched_boxes


def test_boxes_are_matched_once() -> None:
    truth = np.array([[0, 0, 10, 10], [20, 0, 30, 10]], np.float32)
    found = np.array([[1, 0, 11, 10], [0, 0, 10, 10], [24, 0, 40, 10]], np.float32)
    assert matched_boxes(found, truth) == 1
    assert matched_boxes(found, truth, iou=0.3) == 2
    assert matched_boxes(found[:0], truth) == 0
