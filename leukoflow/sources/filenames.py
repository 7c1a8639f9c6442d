"""What a file is by its name alone: litter of systems, an upload that never ended, a slide that is no picture.

Names of any source, inbox and upload are judged here and nowhere else, so that a file means the same wherever it comes
from.
"""

from __future__ import annotations

import re

_LITTER_FOLDERS = re.compile(
    r"""
    __macosx | \.appledouble | \.appledesktop | \.temporaryitems | temporary[ ]items | network[ ]trash[ ]folder
    | \.spotlight-v\d+ | \.fseventsd | \.documentrevisions-v\d+ | \.trash | \.trashes | \.trash-.*
    | \$recycle\.bin | recycler | recycled | system[ ]volume[ ]information | lost\+found | \.thumbnails
    | @eadir | \#recycle | \#snapshot | @recycle | @recently-snapshot | \.@__thumb | \.@upload_cache
    | \.snapshots? | ~snapshot | \.zfs | \.~tmp~
    """,
    re.IGNORECASE | re.VERBOSE,
)
"""Folders of operating systems and of network storage: previews, bins, and copies of what is or was elsewhere."""

_LITTER_FILES = re.compile(
    r"""
    thumbs\.db(:encryptable)? | ehthumbs(_vista)?\.db | desktop\.ini | \.ds_store | \.localized | icon\r | \.apdisk
    | \.directory | \.?picasa\.ini | \._.* | ~\$.* | \.~lock\..* | \.nfs[0-9a-f]{8,} | \.fuse_hidden.* | \.smbdelete.*
    """,
    re.IGNORECASE | re.VERBOSE,
)

_UNFINISHED = re.compile(
    r"""
    .+\.(part | partial | filepart | crdownload | download | opdownload | aria2 | tmp)
    | \..+\.(jpe?g | png | tiff? | bmp | jp2 | zip | tar | t?gz | zst)\.[A-Za-z0-9]{6}  # of rsync
    """,
    re.IGNORECASE | re.VERBOSE,
)

_NO_PICTURES = {
    ".mrxs": "the thumbnail of a MIRAX slide, whose pixels lie in the folder beside it",
    ".vsi": "the overview of a VSI slide, whose pixels lie in the folder beside it",
}
"""Endings of files whose bytes are a JPEG or TIFF, though the picture is elsewhere."""


def is_litter(path: str) -> bool:
    """Tell whether this is no image that anybody handed over. `path` has `/` between its folders."""
    return is_left_behind(path) or is_unfinished(path)


def is_left_behind(path: str) -> bool:
    """Tell whether an operating system, network storage or an editor left this file behind for its own use."""
    *folders, name = path.split("/")
    return _LITTER_FILES.fullmatch(name) is not None or any(_LITTER_FOLDERS.fullmatch(folder) for folder in folders)


def is_unfinished(path: str) -> bool:
    """Tell whether this is the name of a file that is still being copied, or never was to its end."""
    return _UNFINISHED.fullmatch(path.rpartition("/")[2]) is not None


def no_picture(path: str) -> str | None:
    """Say why a file of this name holds no field, whatever its bytes are; None where only they can tell."""
    ending = path[path.rfind(".") :].lower()
    if ending not in _NO_PICTURES:
        return None
    return f"not a field: {_NO_PICTURES[ending]}; slides are not read yet: export its fields as JPEG, PNG or TIFF"
