"""Litter of systems and of broken copies is ignored, and counted."""

from __future__ import annotations

from pathlib import Path

from made_up_sources import listed, saved, tar_of, zip_of

from leukoflow.sources.identify import identify


def test_litter_and_folders_are_ignored_not_lost(tmp_path: Path) -> None:
    names = ["a/", "a/x.jpg", "a/Thumbs.db", "__MACOSX/a/._x.jpg", "a/.DS_Store", "._y.jpg", "a/desktop.ini", "y.jpg"]
    files = {name: b"" if name.endswith("/") else b"1" for name in names}
    for i, data in enumerate((zip_of(files), tar_of(files))):
        members, listing = listed(saved(tmp_path, data, f"litter{i}"))
        assert [m.image_key for m in members] == ["a/x.jpg", "y.jpg"]
        assert listing.ignored == 6


LITTER = [
    "a/@eaDir/x.jpg/SYNOFILE_THUMB_M.jpg", "$RECYCLE.BIN/$R1.jpg", "$Recycle.Bin/S-1-5/$R2.jpg", ".Trash-1000/x.png",
    ".Trashes/501/x.png", ".snapshot/hourly.0/x.png", "~snapshot/x.png", ".zfs/snapshot/x.png", "#recycle/x.png",
    "#snapshot/x.png", "@Recycle/x.png", ".@__thumb/x.jpg", ".AppleDouble/x.jpg", "lost+found/#12.jpg",
    "System Volume Information/x", ".Spotlight-V100/x", "a/THUMBS.DB", "Thumbs.db:encryptable", "Desktop.ini",
    "a/~$x.jpg", ".~lock.x.png#", ".nfs000000000a1b2c3d00000001", "x.jpg.part", "x.jpg.PART", "x.png.crdownload",
    "x.tif.filepart", "x.tmp", "x.jpg.partial", "a/.x.jpg.Ab3dE9", ".~tmp~/x.jpg",
]  # fmt: skip

KEPT = [
    "eaDir/x.jpg", "a/@eaDir", "recycle/x.jpg", "part/x.jpg", "x.part/y.jpg", "snapshot/x.png", "lost+found", "x~$.jpg",
    ".hidden.jpg", "x.part.jpg", "Trash/x.jpg", "thumbs.jpg",
]  # fmt: skip


def test_what_systems_and_broken_copies_leave_behind_is_ignored_wherever_it_lies(tmp_path: Path) -> None:
    files = dict.fromkeys(LITTER + KEPT, b"1")
    for i, data in enumerate((zip_of(files), tar_of(files))):
        members, listing = listed(saved(tmp_path, data, f"left{i}"))
        assert sorted(m.image_key for m in members) == sorted(KEPT)
        assert listing.ignored == len(LITTER)
    for name in LITTER:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(b"1")
    (tmp_path / "in" / "x.jpg").write_bytes(b"1")
    members, listing = listed(identify(tmp_path / "in"))
    assert [m.image_key for m in members] == ["x.jpg"]
    assert listing.ignored == len(LITTER)
