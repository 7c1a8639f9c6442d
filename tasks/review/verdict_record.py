"""A person's verdict on a field or slide: what it says, what holds after several, and what none may say."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum

from leukoflow.core.errors import RequestError
from leukoflow.runs.records import CLASSES, Status
from leukoflow.tasks.review.public import ALWAYS_PRESENT, INTERNAL

NOTHING = "0" * 64
"""What the first file names as the digest of the one before it."""
COMMENT_CHARACTERS = 2000
WHO_CHARACTERS = 200

Target = tuple[str, str]
"""What a verdict is about: (`image`, image key) or (`slide`, grouping and slide id joined by a colon)."""


class Action(StrEnum):
    """What somebody did."""

    ACCEPT = "accept"
    CORRECT = "correct"
    WITHDRAW = "withdraw"
    FLAG = "flag"
    UNFLAG = "unflag"
    COMMENT = "comment"


@dataclass(frozen=True, slots=True)
class Verdict:
    """One act of one person on one field or slide, with the prediction that was on the screen.

    `label` is that of a `correct`, or of the decision that a `withdraw` takes back; else null. `at` is ISO 8601 in UTC.
    """

    __pydantic_config__ = ALWAYS_PRESENT

    run_id: str = field(metadata=INTERNAL)
    action: Action
    who: str
    at: str
    # Either `image_key` is given, or `slide_id` with its `grouping`.
    image_key: str | None = field(default=None, metadata=INTERNAL)
    slide_id: str | None = field(default=None, metadata=INTERNAL)
    grouping: str | None = field(default=None, metadata=INTERNAL)
    label: str | None = None
    comment: str | None = None
    seen_status: str | None = None
    seen_label: str | None = None
    seen_confidence: float | None = None
    seen_bundle_digest: str | None = None

    @property
    def target(self) -> Target:
        """What it is about."""
        return ("image", self.image_key) if self.image_key is not None else slide_target(self.grouping, self.slide_id)

    @property
    def seen_answer(self) -> str | None:
        """The label that the model answered with; None where it abstained, whatever was noted of its leaning."""
        return None if self.seen_status == Status.ABSTAINED else self.seen_label

    @property
    def said(self) -> str | None:
        """The label that the person stands for; None where none was given."""
        if self.action is Action.ACCEPT:
            return self.seen_label
        return self.label if self.action is Action.CORRECT else None

    @property
    def agrees(self) -> bool:
        """Whether it is a decision for what the model answered, by whichever key it was made."""
        return self.said is not None and self.said == self.seen_answer

    @property
    def corrects(self) -> bool:
        """Whether it is a decision for another label than the model answered."""
        return self.said is not None and self.seen_answer not in (None, self.said)


@dataclass(frozen=True, slots=True)
class Standing:
    """The current state of review: the decision that counts, if any, the flag and the last comment."""

    __pydantic_config__ = ALWAYS_PRESENT

    decision: Verdict | None = None  # the last accept or correct, unless it was withdrawn
    flagged: bool = False
    comment: str | None = None
    verdicts: int = 0


@dataclass(frozen=True, slots=True)
class Verdicts:
    """All verdicts of a run in their order."""

    given: tuple[Verdict, ...] = ()
    damaged: int = 0  # files that cannot be read; `leukoflow verify` names them
    head: str = NOTHING  # digest of the last file's entry: differs when anything was added

    def standings(self) -> dict[Target, Standing]:
        """Return what holds by now of everything that has a verdict."""
        found: dict[Target, Standing] = {}
        for verdict in self.given:
            found[verdict.target] = _after(found.get(verdict.target, Standing()), verdict)
        return found

    def of(self, target: Target) -> tuple[Verdict, ...]:
        """List everything that was said of one field or slide, the first word first."""
        return tuple(v for v in self.given if v.target == target)


def slide_target(grouping: str | None, slide_id: str | None) -> Target:
    """Return a slide as the target of a verdict."""
    return ("slide", f"{grouping}:{slide_id}")


def moment() -> str:
    """Return the present time, ISO 8601 in UTC, to the millisecond: two verdicts of one second keep their order."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _after(before: Standing, verdict: Verdict) -> Standing:
    action = verdict.action
    return Standing(
        decision=_decided(before.decision, verdict),
        flagged={Action.FLAG: True, Action.UNFLAG: False}.get(action, before.flagged),
        comment=verdict.comment or before.comment,
        verdicts=before.verdicts + 1,
    )


def _decided(before: Verdict | None, verdict: Verdict) -> Verdict | None:
    if verdict.action in (Action.ACCEPT, Action.CORRECT):
        return verdict
    if verdict.action is Action.WITHDRAW and before is not None and before.said == verdict.label:
        return None  # one that names another label was overtaken by a new decision, which stays
    return before


def check_verdict(verdict: Verdict) -> None:
    """Raise RequestError where a verdict says nothing, or something that cannot be said here."""
    if (verdict.image_key is None) == (verdict.slide_id is None or verdict.grouping is None):
        raise RequestError("a verdict is about one field or about one slide: name either")
    if verdict.action is Action.CORRECT and verdict.label not in CLASSES:
        raise RequestError(f"a correction needs a label, one of {', '.join(CLASSES)}")
    if verdict.action is Action.WITHDRAW and verdict.label not in CLASSES:
        raise RequestError("there is no decision to withdraw here")
    if verdict.action not in (Action.CORRECT, Action.WITHDRAW) and verdict.label is not None:
        raise RequestError(f"only a correction has a label, not {verdict.action}")
    if verdict.action is Action.CORRECT and verdict.seen_status == Status.QUARANTINED:
        raise RequestError("no picture could be read here, so there is nothing to label: flag it or comment on it")
    if verdict.action is Action.ACCEPT and verdict.seen_status == Status.ABSTAINED:
        raise RequestError(
            "the model abstained from this field, so there is no answer to accept: say which class it is, flag it or "
            "comment on it"
        )
    if verdict.action is Action.ACCEPT and verdict.seen_label is None:
        raise RequestError("there is no prediction to accept here: correct it, flag it or comment on it")
    if verdict.action is Action.COMMENT and not (verdict.comment or "").strip():
        raise RequestError("the comment is empty: write something, or take another action")
    if len(verdict.comment or "") > COMMENT_CHARACTERS:
        raise RequestError(f"a comment may have {COMMENT_CHARACTERS:,} characters: shorten it")
    if not verdict.who.strip() or len(verdict.who) > WHO_CHARACTERS:
        raise RequestError("whose verdict this is must be known")
    for text in (verdict.comment, verdict.who):
        if text is not None and not all(c.isprintable() or c in "\n\t" for c in text):
            raise RequestError("a comment or a name holds characters that cannot be shown: type it again")
    try:
        if datetime.fromisoformat(verdict.at).utcoffset() is None:
            raise ValueError
    except ValueError:
        raise RequestError(f"{verdict.at!r} is no time with its zone") from None
