"""Commands about what leaves the house: results for other systems, and people's labels for training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from leukoflow.apps.cli.common import Debug, Out, RunId, reached, reported, root_of, use_configured_prefect
from leukoflow.core.errors import ConfigError


def add_to(app: typer.Typer) -> None:
    """Add the commands of this module to the command line."""
    for command in (export, labels):
        app.command()(command)


def export(
    out: Out,
    run_id: RunId,
    to: Annotated[Path, typer.Option("--to", metavar="FILE", help="New file: .csv, .parquet or .fhir.json.")],
    patient: Annotated[
        str | None,
        typer.Option("--patient", metavar="ID", help="Only this patient: as the manifest named it, or the pseudonym."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Write a run, or a patient of it, as CSV, Parquet or HL7 FHIR, with what people have said.

    FHIR is a Bundle (R4B) of one DiagnosticReport with its Observations for each slide, or for the patient. All of it
    is for research use, and says so.

    **Examples**: `leukoflow export out night-2026-03-01 --to night.csv`;
    `leukoflow export out night-2026-03-01 --patient 1234 --to 1234.fhir.json`
    """
    with reported(debug):
        from leukoflow.apps.cli.view.console import open_console
        from leukoflow.core.counts import count_of
        from leukoflow.runs.progress import read_manifest
        from leukoflow.storage.opening import open_storage
        from leukoflow.tasks.intake.patient_key import patient_key
        from leukoflow.tasks.review.export.stream import Format, Scope
        from leukoflow.tasks.review.export.stream import export as pieces
        from leukoflow.tasks.review.keys import patient_key_of
        from leukoflow.tasks.review.runs import open_run_named
        from leukoflow.tasks.upkeep.patients import patient_name, runs_of_other_keys

        kind = next((k for k in Format if to.name.endswith(k.suffix)), None)
        if kind is None:
            raise ConfigError(
                f"{to}: the ending of the name decides the format; end it with {', '.join(k.suffix for k in Format)}"
            )
        if to.exists():
            raise ConfigError(f"{to} exists; name another file")
        if patient is not None:
            use_configured_prefect(debug)  # the key may come from a block of that server
        key = patient_key() if patient is not None else None
        scope = Scope(patient=None if patient is None else patient_key_of(patient_name(patient, key)))
        if patient is not None:
            runs_of_other_keys(reached(out), patient, key, [run_id])
        table = open_run_named(reached(out), run_id)
        found = pieces(table, scope, kind)
        try:
            with to.open("xb") as sink:
                sink.writelines(found)
        except OSError as error:
            raise ConfigError(f"{to} cannot be written: {error.strerror or error}") from error
        rows = len(table.rows_of(scope.slide, scope.patient))
        open_console().print(
            f"{count_of(rows, 'field')} of {run_id} in {to}", soft_wrap=True, highlight=False, markup=False
        )
        if read_manifest(open_storage(root_of(out, run_id))) is None:
            open_console().print(
                f"[yellow]{run_id} is not finished[/]: only what it has done so far is in the file", soft_wrap=True
            )


def labels(
    out: Out,
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="Folder for all_fields.csv and all_fields.zip.")],
    run_ids: Annotated[
        list[str] | None, typer.Option("--run", metavar="RUN_ID", help="Only of these runs; may be repeated.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Write what people accepted or corrected as training data for `leukoflow train`.

    The latest decision on each image counts; flagged fields are left out. Images are read again from their sources, and
    named by their digests; neither patients nor slides are named, but those of one patient stay in one group.

    **Example**: `leukoflow labels out --to reviewed`
    """
    with reported(debug):
        from leukoflow.apps.cli.view.console import open_console
        from leukoflow.tasks.review.export.labels import write_training_set
        from leukoflow.tasks.review.keys import run_key_of

        keys = None if not run_ids else [run_key_of(name) for name in run_ids]
        made = write_training_set(reached(out), to, keys)
        lost = f"; {made.lost:,} labelled images cannot be read any more and are left out" if made.lost else ""
        open_console().print(
            f"{made.images:,} labelled fields in {made.folder}{lost}", soft_wrap=True, highlight=False, markup=False
        )
