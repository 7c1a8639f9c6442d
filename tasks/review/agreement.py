"""Agreement of people and the model, over all runs of an output folder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime

import numpy as np

from leukoflow.runs.records import CLASSES
from leukoflow.tasks.review.frame import Ints
from leukoflow.tasks.review.kappa import kappa_of, no_kappa
from leukoflow.tasks.review.public import INTERNAL, described
from leukoflow.tasks.review.run_cache import cache_of
from leukoflow.tasks.review.runs import list_runs
from leukoflow.tasks.review.verdict_record import Verdict


@dataclass(frozen=True, slots=True)
class WeekLine:
    """Decisions of one week."""

    week: str  # 2026-W48
    n: int
    accepted: int
    corrected: int
    kappa: float | None


@dataclass(frozen=True, slots=True)
class Agreement:
    """Decisions on fields against the predictions that reviewers saw, one for each field of each run: the last.

    People choose what they look at and see the prediction first: this is no independent reading, and no accuracy.
    """

    n: int
    accepted: int
    corrected: int = field(
        metadata=described("to another label; a correction to the label that was predicted counts as accepted")
    )
    without_prediction: int = field(
        metadata=described("labelled by people where nothing was predicted, abstained fields included; not in n")
    )
    confusion: tuple[tuple[int, ...], ...] = field(
        metadata=described("rows: predicted, columns: the reviewer's label; Benign, Early, Pre, Pro")
    )
    kappa: float | None = field(metadata=described("Cohen's"))
    kappa_interval: tuple[float, float] | None = field(metadata=described("95 %"))
    no_kappa: str = field(metadata=described("why there is no kappa, empty where there is one"))
    weeks: tuple[WeekLine, ...]
    reviewers: tuple[tuple[str, int, int], ...] = field(metadata=INTERNAL)  # who, decisions, corrections
    unread: tuple[str, ...] = field(metadata=described("runs whose verdicts could not all be read"))


def agreement(out: str) -> Agreement:
    """Compare what people decided with what was predicted, over all runs but shadow runs."""
    cache = cache_of(out)
    decided: list[Verdict] = []
    unread: list[str] = []
    runs = [line.run_id for line in list_runs(out) if line.shadow_of is None]
    given = cache.map_runs(lambda run_id: cache.verdict_reader(run_id).read(), runs)
    for run_id, verdicts in zip(runs, given, strict=True):
        if verdicts.damaged:
            unread.append(run_id)
        decided += [s.decision for (kind, _), s in verdicts.standings().items() if kind == "image" and s.decision]
    return agreement_of(decided, unread)


def agreement_of(decided: Iterable[Verdict], unread: Sequence[str] = ()) -> Agreement:
    """Return the agreement of decisions, one for each field."""
    labelled = [v for v in decided if v.said]
    known = [(v, CLASSES.index(v.seen_answer), CLASSES.index(v.said or "")) for v in labelled if v.seen_answer]
    confusion = np.zeros((4, 4), np.int64)
    weeks: dict[str, Ints] = {}
    reviewers: dict[str, list[int]] = {}
    for verdict, seen, said in known:
        confusion[seen, said] += 1
        year, week, _ = datetime.fromisoformat(verdict.at).isocalendar()
        weeks.setdefault(f"{year}-W{week:02d}", np.zeros((4, 4), np.int64))[seen, said] += 1
        own = reviewers.setdefault(verdict.who, [0, 0])
        own[0] += 1
        own[1] += seen != said
    kappa, interval = kappa_of(confusion)
    n, same = int(confusion.sum()), int(np.trace(confusion))
    return Agreement(
        n=n,
        accepted=same,
        corrected=n - same,
        without_prediction=len(labelled) - len(known),
        confusion=tuple(tuple(int(v) for v in row) for row in confusion),
        kappa=kappa,
        kappa_interval=interval,
        no_kappa=no_kappa(confusion),
        weeks=tuple(
            WeekLine(week, int(c.sum()), int(np.trace(c)), int(c.sum() - np.trace(c)), kappa_of(c)[0])
            for week, c in sorted(weeks.items())
        ),
        reviewers=tuple((who, given, changed) for who, (given, changed) in sorted(reviewers.items())),
        unread=tuple(unread),
    )
