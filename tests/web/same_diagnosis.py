"""Whether two diagnoses are the same."""

from __future__ import annotations

import numpy as np
import pytest

from leukoflow.tasks.inference.single import Examination


def same(one: Examination, other: Examination, rounding: float = 0.0) -> None:
    """Everything but the time it took; `rounding` allows for another number of threads in the networks and in BLAS."""
    for name in Examination.__slots__:
        mine, theirs = getattr(one, name), getattr(other, name)
        if name == "tiles":
            assert len(mine) == len(theirs)
            for a, b in zip(mine, theirs, strict=True):
                for field in type(a).__slots__:
                    x, y = np.asarray(getattr(a, field)), np.asarray(getattr(b, field))
                    assert x.dtype == y.dtype
                    assert np.allclose(x, y, rtol=0, atol=rounding * (x.dtype.kind == "f")), field
        elif name == "seconds":
            assert [s for s, _ in mine] == [s for s, _ in theirs]
        elif name == "cells":
            assert (mine is None) == (theirs is None)
            assert mine is None or mine.drop_columns("attention").equals(theirs.drop_columns("attention"))
            assert mine is None or np.allclose(mine["attention"], theirs["attention"], rtol=0, atol=rounding)
        elif name in ("ood", "probabilities"):
            assert mine == (theirs if not rounding else pytest.approx(theirs, rel=0, abs=rounding)), name
        else:
            assert mine == theirs, name
