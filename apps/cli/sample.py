"""The command that renders an archive to try things out with."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from leukoflow.apps.cli.common import Debug, refuse_remote, reported


def add_to(app: typer.Typer) -> None:
    """Add the commands of this module to the command line."""
    app.command()(sample)


def sample(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="New or empty folder, or that of an earlier sample.")
    ],
    images: Annotated[int, typer.Option("--images", "-n", min=1, help="How many fields to render.")] = 64,
    seed: Annotated[int, typer.Option("--seed", min=0, help="The same seed gives the same bytes.")] = 0,
    side: Annotated[int, typer.Option("--side", min=32, help="Width and height of a field in pixels.")] = 224,
    debug: Debug = False,
) -> None:
    """Render an archive of made-up smear fields with their ground truth.

    Writes DIR/smears.zip and the same images below DIR/fields, masks of nuclei, cytoplasm and single cells below
    DIR/truth, DIR/truth.csv, and DIR/manifest.csv for `leukoflow run --manifest`. The cells are drawn, not real: good
    for trying things out, not for judging the model.

    **Example**: `leukoflow sample demo --images 96 --seed 7`
    """
    with reported(debug):
        from leukoflow.apps.cli.view.console import open_console
        from leukoflow.tasks.imaging.synthetic import write_sample

        refuse_remote(DIR=directory)
        console = open_console()
        with console.status(f"rendering {images:,} fields", spinner="dots"):
            made = write_sample(directory, images, seed, side)
        console.print(
            f"{made.images:,} fields of {made.slides:,} slides with {made.cells:,} white cells in {made.archive}",
            soft_wrap=True,
            highlight=False,
        )
        console.print(f"next: {next_command(made.archive, made.manifest)}", soft_wrap=True, markup=False)


def next_command(archive: Path, manifest: Path) -> str:
    """Return the command that screens a sample, as the README has it."""
    return shlex.join(["leukoflow", "run", str(archive), "--out", "out", "--manifest", str(manifest)])
