"""Which line of the manifest each member of a source has, and what of a manifest concerns the items of one run."""

from __future__ import annotations

import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import PurePosixPath

import pyarrow as pa

from leukoflow.runs.ledger import Selection
from leukoflow.runs.records import Member
from leukoflow.tasks.intake.manifest import Manifest
from leukoflow.tasks.intake.matching import hint, match
from leukoflow.tasks.intake.spelling import folded, spelled
from leukoflow.tasks.store.slides import slide_of

APART = "(not in the manifest)"
"""How the name of a folder ends that a slide of the manifest is called by, too."""


class Join:
    """The line of the manifest for each member, and what that makes of slides: decided when all have been seen.

    `found` says of each row of the manifest whether its image is there.
    """

    def __init__(self, known: Manifest) -> None:
        self.known = known
        self.found = bytearray(len(known.table))
        self.remarks: list[str] = []
        self._slides = known.table["slide_id"].to_pylist()
        self._keys = list(known.rows)  # of the images, once they are found
        self._rows = array("q")  # of each member, in order; -1 without one
        self._dotted = array("q", [-1]) * len(known.table)  # of each line, the member that has it but for a `./`
        self._unlisted: dict[int, str] = {}  # members without a line, by ordinal
        self._named: dict[str, str] = {}  # from folders to the slide that images without one there belong to

    def see(self, members: Sequence[Member]) -> None:
        """Take up the next members."""
        for member in members:
            row = self.known.row_of(member.image_key)
            if row is not None and member.image_key in self.known.rows:
                self._give_back(row, member.image_key)
            elif row is not None and not self.found[row]:
                self._dotted[row] = member.ordinal
            if row is None or self.found[row]:  # `a.jpg` and `./a.jpg` are two images, and have one line
                self._unlisted[member.ordinal] = member.image_key
                row = -1
            else:
                self.found[row] = 1
            self._rows.append(row)

    def _give_back(self, row: int, key: str) -> None:
        """Take a line from `./a.jpg` where `a.jpg` comes, too: the name that is equal to it wins."""
        ordinal = self._dotted[row]
        if ordinal >= 0:
            self._rows[ordinal], self._dotted[row] = -1, -1
            self._unlisted[ordinal] = f"./{key}"
            self.found[row] = 0

    def match(self, own_names: Sequence[str]) -> None:
        """Match what is spelled otherwise."""
        keys = self._keys
        rows = [row for row in range(len(self.found)) if not self.found[row]]
        images = list(self._unlisted)
        if rows and images:
            found = match(
                [keys[row] for row in rows],
                list(self._unlisted.values()),
                any(self.found),
                own_names,
            )
            for image, row in found.rows.items():
                self._rows[images[image]] = rows[row]
                self.found[rows[row]] = 1
                self._keys[rows[row]] = self._unlisted.pop(images[image])
            for rule in found.rules:
                places = self.known.places([rows[row] for row in rule.rows])
                self.remarks.append(f"matched to their images {rule.words}: {places} of the manifest")

    def conclude(self) -> None:
        """Say what would match, and find the slides of images that the manifest gives none."""
        absent = [row for row, found in enumerate(self.found) if not found]
        if absent and self._unlisted:
            words = hint([self._keys[row] for row in absent], list(self._unlisted.values()))
            if words is not None:
                self.remarks.append(f"{len(absent):,} images that the manifest names are not in the source; {words}")
        if absent and len(absent) == len(self.found):
            self.remarks.append("no line of the manifest names an image of the source: is it the manifest of this one?")
        slides_in: dict[str, set[str]] = defaultdict(set)
        folders_of: dict[str, set[str]] = defaultdict(set)
        without = Counter(map(_folder, self._unlisted.values()))
        for row, key in enumerate(self._keys):
            if self.found[row]:
                slide, folder = self._slides[row], _folder(key)
                if slide is None:
                    without[folder] += 1
                else:
                    slides_in[folder].add(slide)
                    folders_of[slide].add(folder)
        belonging = apart = 0
        for folder, count in without.items():
            names = (folder, folder.rpartition("/")[2])
            theirs = [n for n in names if slides_in.get(folder) == {n} and folders_of[n] == {folder}]
            if theirs:
                self._named[folder] = theirs[0]
                belonging += count
            elif folder in folders_of:
                self._named[folder] = f"{folder} {APART}"
                apart += count
        if belonging:
            self.remarks.append(
                f"{belonging:,} images to which the manifest gives no slide lie in the folder of one of its slides, "
                "and are counted to that slide, without a patient"
            )
        if apart:
            self.remarks.append(
                f"{apart:,} images to which the manifest gives no slide lie in a folder that has the name of one of "
                f"its slides and is another: they make a slide of their own, whose name ends with {APART}"
            )

    def joined(self, table: pa.Table) -> pa.Table:
        """Return a shard of the plan with what the manifest says of its images."""
        first = table["ordinal"][0].as_py()
        rows = [row if row >= 0 else None for row in self._rows[first : first + len(table)]]
        taken = self.known.table.take(pa.array(rows, pa.int64()))
        for i, column in enumerate(table.schema):
            if column.name != "image_key" and column.name in taken.column_names:
                table = table.set_column(i, column, taken[column.name])
        if not self._named:
            return table
        pairs = zip(table["slide_id"].to_pylist(), table["image_key"].to_pylist(), strict=True)
        slides = [self._named.get(_folder(key)) if slide is None else slide for slide, key in pairs]
        i = table.schema.get_field_index("slide_id")
        return table.set_column(i, table.schema.field(i), pa.array(slides, pa.string()))


def _folder(key: str) -> str:
    return slide_of(None, key)[1]


# --- the manifest of an inbox -----------------------------------------------------------------------------------------


def item_of(key: str) -> str:
    """Return the entry of the inbox that an image belongs to: the first part of its path."""
    return key.partition("/")[0]


def items_by_spelling(items: Iterable[str]) -> Callable[[str], str | None]:
    """Return a function from a key of the manifest to the item it belongs to, however it is spelled; None for none."""
    names = set(items)
    forms = Counter(folded(name) for name in names)
    single = {form: name for name in names if forms[form := folded(name)] == 1}

    def find(key: str) -> str | None:
        return item if (item := item_of(key)) in names else single.get(item_of(folded(key)))

    return find


def manifest_of(known: Manifest, selection: Selection) -> Manifest:
    """Return what the manifest of an inbox says of the items of one run; of an archive, keys are those inside of it."""
    items, archive = set(selection.table["item"].to_pylist()), selection.archive
    item_in = items_by_spelling(items)
    rows: dict[str, int] = {}
    for key, row in known.rows.items():
        if item_in(key) is None or (archive is not None and "/" not in spelled(key)):
            continue
        inside = key if archive is None else _below_item(key)
        rows[inside if inside not in rows else key] = row
    kept = list(rows.values())
    table = known.table.take(pa.array(kept, pa.int64()))
    table = table.set_column(0, known.table.schema.field(0), pa.array(list(rows), pa.string()))
    lines = array("q", (known.lines[row] for row in kept))
    return Manifest(table, {key: row for row, key in enumerate(rows)}, lines, known.unit, known.remarks)


def _below_item(key: str) -> str:
    """Return a key without the name of its item in front."""
    item, slash, inside = key.partition("/")
    return inside if slash and "\\" not in key and spelled(item) not in ("", ".") else spelled(key).partition("/")[2]


def excuse(known: Manifest, selection: Selection, found: bytearray) -> None:
    """Excuse what is lacking of an item that was taken before: this run has the rest, and that is not missing."""
    if selection.archive is not None:
        return
    expected = items_by_spelling(selection.expected_items())
    for key, row in known.rows.items():
        if expected(key) is None:
            found[row] = 1


def own_names(uri: str) -> tuple[str, ...]:
    """Return what a manifest may call the source: its name, with and without the ending of an archive."""
    name = PurePosixPath(uri.rstrip("/")).name
    return name, re.sub(r"(\.tar)?\.(zip|tar|gz|tgz|bz2|xz|zst)$", "", name, flags=re.IGNORECASE)
