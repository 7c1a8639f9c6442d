"""Fields summed up: the same numbers as by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from review_world import NIGHT, PROBABILITIES, everything, rows_of

from leukoflow.tasks.review.groups import beta_interval
from leukoflow.tasks.review.runs import open_run_table


def test_mean_malignant_probability_uncertainty_and_entropy_by_hand(spread: Path) -> None:
    table = open_run_table(str(spread.parent), NIGHT)
    rows = rows_of(spread)
    for line in everything(table.slides):
        mine = [r for r in rows if (r["slide_id"] or r["image_key"].rpartition("/")[0]) == line.name]
        said = [r for r in mine if r["status"] == "predicted"]
        diagnosed = [r for r in mine if r["label"] is not None]
        malignant = [1 - r["prob_benign"] for r in said]
        assert line.summary.mean_malignant_probability == pytest.approx(sum(malignant) / len(said))  # not by cells
        assert line.summary.answered_cells == sum(r["n_cells"] for r in said)
        unsure = [r for r in diagnosed if r["status"] == "abstained" or len(r["prediction_set"]) > 1]
        assert line.summary.uncertainty == pytest.approx(len(unsure) / len(diagnosed))
        h = [-sum(r[p] * math.log(r[p]) for p in PROBABILITIES) / math.log(4) for r in said]
        assert line.summary.entropy == pytest.approx(sum(h) / len(h), abs=1e-9)
        if len(said) < 5:
            assert line.summary.interval is None  # too few for an interval
        else:
            low, high = line.summary.interval
            assert 0 <= low < (sum(malignant) + 1) / (len(said) + 2) < high <= 1
        worst = table.field(line.summary.worst)
        assert 1 - worst.probabilities[0] == pytest.approx(max(malignant))


def test_interval() -> None:
    from scipy.stats import beta

    low, high = beta_interval(np.array([0.0, 8.0]), np.array([0.0, 10.0]))
    assert low == pytest.approx(beta.ppf(0.025, [1, 9], [1, 3]))
    assert high == pytest.approx(beta.ppf(0.975, [1, 9], [1, 3]))


def test_a_run_where_nothing_was_predicted(copy: Path) -> None:
    for path in (copy / "predictions").iterdir():
        rows = pq.read_table(path).to_pylist()
        for row in rows:
            row |= dict.fromkeys(
                ("label", "confidence", "prediction_set", "n_cells", "slide_id", "patient_id", *PROBABILITIES)
            )
            row |= {"status": "quarantined", "reason": "damaged"}
        pq.write_table(pa.Table.from_pylist(rows, pq.read_schema(path)), path, use_dictionary=False)
    table = open_run_table(str(copy.parent), NIGHT)
    lines = table.slides().items
    assert {s.name for s in lines} == {"ward-0", "ward-1", "ward-2"}
    assert {s.summary.urgency for s in lines} == {0.5}  # silence is not health
    for line in lines:
        s = line.summary
        assert (s.label, s.mean_malignant_probability, s.uncertainty, s.entropy) == (None,) * 4
        assert s.interval is None  # even odds are no measurement
    assert table.patients().total == 0
    assert table.field(0).probabilities == ()
