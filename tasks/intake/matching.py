"""Which line of a manifest is about which image, where the two are not written alike.

Never are two lines taken for one image, or one for two. What is only a matter of spelling is looked past; folders are
left out only where no line fits as it is and one plain rule holds for the whole source; all else is a hint for people.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from leukoflow.tasks.intake.spelling import folded, spelled

_DEEPEST = 8  # leading folders that are tried


@dataclass(frozen=True, slots=True)
class Rule:
    """A way in which lines were matched: in words, and places of the lines among those that were given."""

    words: str
    rows: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Matching:
    """`rows` from the place of an image to the place of its line, and the rules that found them."""

    rows: dict[int, int]
    rules: tuple[Rule, ...]


def match(rows: Sequence[str], images: Sequence[str], matched: bool = False, own_names: Sequence[str] = ()) -> Matching:
    """Match lines and images that are not equal; `matched` says that others are, so that folders mean what they say.

    `own_names` are those of the source itself, which a manifest may name in front of every image.
    """
    found: dict[int, int] = {}
    rules: list[Rule] = []

    def apply(words: str, pairs: dict[int, int]) -> bool:
        found.update(pairs)
        if pairs:
            rules.append(Rule(words, tuple(sorted(pairs.values()))))
        return bool(pairs)

    def rest() -> tuple[list[int], list[int]]:
        taken = set(found.values())
        return [r for r in range(len(rows)) if r not in taken], [i for i in range(len(images)) if i not in found]

    for form, words in (
        (spelled, "apart from blanks, slashes or the way in which accents are stored"),
        (folded, "apart from upper and lower case"),
    ):
        left, free = rest()
        apply(words, _pairs({r: form(rows[r]) for r in left}, {i: form(images[i]) for i in free}))
    if not found and not matched:
        _folders(rows, images, own_names, apply)
    return Matching(found, tuple(rules))


def _folders(
    rows: Sequence[str], images: Sequence[str], own_names: Sequence[str], apply: Callable[[str, dict[int, int]], bool]
) -> None:
    """Apply the first rule for folders that fits, alone."""
    names, keys = dict(enumerate(map(folded, rows))), dict(enumerate(map(folded, images)))
    shared = len(_shared_folders(keys.values()))
    tried = [_pairs(names, {i: _below(key, depth) for i, key in keys.items()}) for depth in range(1, shared + 1)]
    fitting = [pairs for pairs in tried if pairs]
    if len(fitting) == 1 and apply("without the folder that everything in the source lies in", fitting[0]):
        return
    own = {folded(name) for name in own_names}
    above = _shared_folders(names.values())
    depths = [depth for depth, folder in enumerate(above, start=1) if folder in own]
    if depths:
        pairs = _pairs({r: _below(name, depths[-1]) for r, name in names.items()}, keys)
        if apply("without the folders up to the source's own name", pairs):
            return
    if not any("/" in name for name in names.values()):
        pairs = _pairs(names, {i: _file_name(key) for i, key in keys.items()})
        apply("by the names of files alone, since the manifest names no folders", pairs)


def _pairs(rows: dict[int, str], images: dict[int, str]) -> dict[int, int]:
    """Pair images and lines that agree in a form which no other line and no other image has."""
    row_counts, image_counts = Counter(rows.values()), Counter(images.values())
    single = {form: row for row, form in rows.items() if row_counts[form] == 1}
    return {image: single[form] for image, form in images.items() if image_counts[form] == 1 and form in single}


def _shared_folders(keys: Iterable[str]) -> list[str]:
    """Return the leading folders that all of the paths have in common, the outermost first."""
    shared: list[str] | None = None
    for key in keys:
        folders = key.split("/")[:-1][:_DEEPEST]
        if shared is None:
            shared = folders
        same = 0
        while same < min(len(shared), len(folders)) and shared[same] == folders[same]:
            same += 1
        shared = shared[:same]
        if not shared:
            break
    return shared or []


def _below(key: str, depth: int) -> str:
    """Return a path without its outermost folders; empty where it has not so many."""
    return "/".join(key.split("/")[depth:])


def _file_name(key: str) -> str:
    return key.rpartition("/")[2]


def hint(rows: Sequence[str], images: Sequence[str]) -> str | None:
    """Say in words which rule would match most of what is left. Names nothing, since folders may name patients."""
    rows, images = list(map(folded, rows)), list(map(folded, images))
    tries: list[tuple[int, str]] = []

    def attempt(words: str, row_form: Callable[[str], str], image_form: Callable[[str], str]) -> None:
        pairs = _pairs(
            {r: form for r, row in enumerate(rows) if (form := row_form(row))},
            {i: form for i, image in enumerate(images) if (form := image_form(image))},
        )
        tries.append((len(pairs), words))

    def same(key: str) -> str:
        return key

    for depth in range(1, 5):
        outer = "the outermost folder" if depth == 1 else f"the {depth} outermost folders"
        attempt(f"{outer} of the source stood in front of them", same, lambda key, d=depth: _below(key, d))  # type: ignore[misc]
        attempt(f"{outer} that the manifest gives were left out", lambda key, d=depth: _below(key, d), same)  # type: ignore[misc]
    attempt("their folders were left out of account", _file_name, _file_name)
    attempt("folders and the endings of the file names were left out of account", _bare, _bare)
    count, words = max(tries, key=lambda tried: tried[0])
    return f"{count:,} of {len(rows):,} would match if {words}" if count else None


def _bare(key: str) -> str:
    return PurePosixPath(_file_name(key)).stem
