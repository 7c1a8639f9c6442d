"""Diagnose images from the command line: `python examples/one_image.py IMAGE [IMAGE ...]`."""

from __future__ import annotations

import sys

import leukoflow


def main(paths: list[str]) -> None:
    """Print one line for each image, and its cells that weighed most."""
    for path in paths:
        found = leukoflow.diagnose(path)
        print(f"{path}: {found.headline}" + (f" ({found.reason})" if found.reason else ""))
        for cell in found.cells.sort_by([("attention", "descending")]).slice(0, 3).to_pylist():
            print(
                f"  cell {cell['cell_id']}: attention {cell['attention']:.3f}, nucleus {cell['nucleus_area_px']:.0f} px"
            )


if __name__ == "__main__":
    main(sys.argv[1:])
