"""Rows in Zarr arrays: at their place, however often they are written."""

from __future__ import annotations

import numpy as np
import pytest
import zarr

from leukoflow.core.errors import StorageError
from leukoflow.tasks.store.arrays import array_of, write_rows


def test_rows_are_written_at_their_place_and_may_be_written_again() -> None:
    group = zarr.open_group(zarr.storage.MemoryStore(), mode="a")
    rows = np.arange(12, dtype=np.float32).reshape(6, 2)
    for start, end in ((0, 4), (4, 6), (4, 6)):
        write_rows(group, "hybrid", start, rows[start:end], (2, 2), (4, 2))
    assert np.array_equal(np.asarray(array_of(group, "hybrid")[:]), rows)
    with pytest.raises(StorageError, match="lacks the array nothing"):
        array_of(group, "nothing")
