"""Read what a run has left: `python examples/read_a_run.py OUT/RUN_ID`. Needs neither torch nor Prefect."""

from __future__ import annotations

import sys

import pyarrow.dataset as ds

import leukoflow


def main(place: str) -> None:
    """Print the run's answers by label, and the nuclei of the image with the most cells."""
    run = leukoflow.open_run(place)
    print(run)
    answered = run.predictions.to_table(columns=["label"], filter=ds.field("status") == "predicted")
    for counted in answered["label"].combine_chunks().value_counts().to_pylist():
        print(f"  {counted['values']}: {counted['counts']} fields")
    most = run.predictions.to_table(columns=["image_key", "n_cells"]).sort_by([("n_cells", "descending")]).to_pylist()
    if most and most[0]["n_cells"]:
        masks = run.mask(most[0]["image_key"])
        print(
            f"  {most[0]['image_key']}: {most[0]['n_cells']} cells, {int((masks.semantic == 2).sum())} nucleus pixels"
        )


if __name__ == "__main__":
    main(sys.argv[1])
