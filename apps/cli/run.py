"""The command that screens a source."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from leukoflow.apps.cli.common import Debug, execute, reported, require_named


def add_to(app: typer.Typer) -> None:
    """Add the commands of this module to the command line."""
    app.command()(run)


def run(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A folder, a zip, a tar (plain, gz, bz2, xz, zst), one image, or an s3:// prefix or object of these.",
        ),
    ],
    out: Annotated[str, typer.Option("--out", "-o", help="Folder or s3:// prefix; the run writes to OUT/RUN_ID.")],
    run_id: Annotated[
        str | None,
        typer.Option("--run-id", help="Name of the run. Default: the source's name and a fingerprint of the settings."),
    ] = None,
    manifest: Annotated[
        str | None,
        typer.Option(
            "--manifest",
            help="CSV or Parquet, local or s3://: image_key and any of slide_id patient_id site scanner um_per_px.",
        ),
    ] = None,
    bundle: Annotated[
        str | None,
        typer.Option("--bundle", help="Name, directory or s3:// prefix of the model bundle. Default: pocket."),
    ] = None,
    config: Annotated[Path | None, typer.Option("--config", help="TOML file with any of the settings.")] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", min=0, help="Local worker processes; 0 is one per core.")
    ] = None,
    shard_size: Annotated[
        int | None, typer.Option("--shard-size", help="Images per shard, a multiple of 16. Default: 128.")
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            "--cluster", metavar="ADDRESS", help="A Dask scheduler, tcp://host:8786. Default: local processes."
        ),
    ] = None,
    reuse: Annotated[
        str | None,
        typer.Option(
            "--reuse",
            metavar="RUN_ID",
            help="Take over the stages that an earlier run in OUT has computed from the same input.",
        ),
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="auto, cpu or cuda. Default: auto.")] = None,
    um_per_px: Annotated[
        float | None, typer.Option("--um-per-px", help="Micrometres per pixel of images whose manifest row has none.")
    ] = None,
    keep_prefect: Annotated[
        bool, typer.Option("--keep-prefect", help="Leave the Prefect server that this run starts running.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Predict every image of SOURCE.

    Leaves in OUT/RUN_ID one row for every image (`predictions/`), its cells (`cells/`), masks and features (Zarr),
    a ranking of the slides (`slides.parquet`), `report.html`, and last of all `manifest.json`.

    The same command resumes: a run that was killed or stopped does only what is missing, and a finished one
    returns at once. Ctrl-C lets the shards in work finish first.

    Uses the Prefect server of `PREFECT_API_URL` or of the active profile; without one it starts its own.

    **Examples**

    `leukoflow run smears.zip --out out`

    `leukoflow run s3://lab/2026-03-01/ --out s3://results --manifest slides.csv --cluster tcp://gpu1:8786`

    **Exit codes**: 0 every image accounted for; 2 source unusable or empty; 3 some members quarantined; 4 members
    missing or source truncated; 130 stopped, and can be resumed; 1 anything else.
    """
    with reported(debug):
        from leukoflow.core.config import load_config

        require_named("SOURCE", source)
        require_named("--out", out)
        settings = load_config(
            config,
            source=source,
            out=out,
            run_id=run_id,
            manifest=manifest,
            bundle=bundle,
            reuse=reuse,
            shard_size=shard_size,
            um_per_px=um_per_px,
            device=device,
            cluster={"workers": workers, "address": cluster},
        )
        raise typer.Exit(execute(settings, keep_prefect, debug))
