"""Commands about finished runs: check, compare, compact and delete them, and erase a patient from them."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from leukoflow.apps.cli.common import (
    Debug,
    Out,
    RunId,
    existing,
    fail,
    reached,
    refuse_remote,
    reported,
    root_of,
    use_configured_prefect,
)
from leukoflow.core.errors import ConfigError, LeukoflowError
from leukoflow.runs.layout import OutKey


def add_to(app: typer.Typer) -> None:
    """Add the commands of this module to the command line."""
    for command in (verify, diff, compact, retention, erase):
        app.command()(command)


def verify(
    out: Out,
    run_id: Annotated[
        str | None, typer.Argument(metavar="[RUN_ID]", help="One run; without it, all finished runs in OUT.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Check that finished runs are still exactly what was committed.

    Reads every byte: digests of all parts and tables, markers and totals against the manifest, the rows against the
    plan (each member exactly once), whether anything lies there that nobody has committed, and whether the audit logs
    of OUT were tampered with. Says what is wrong and what to do about it, and changes nothing.

    **Examples**: `leukoflow verify out smears-1f0c63b2`; `leukoflow verify s3://results`

    **Exit codes**: 0 all is as it was committed; 1 something is not.
    """
    with reported(debug):
        from leukoflow.apps.cli.view.console import open_console
        from leukoflow.apps.cli.view.finished import show_audit, show_broken, show_verification
        from leukoflow.apps.cli.view.live import bytes_progress
        from leukoflow.tasks.upkeep.audit import verify_log
        from leukoflow.tasks.upkeep.verify import finished_runs, verify_run

        console = open_console()
        names, unfinished = ([run_id], []) if run_id is not None else finished_runs(existing(out))
        logs = [(file, log) for file in (OutKey.AUDIT, OutKey.WEB_AUDIT) if (log := verify_log(out, file)) is not None]
        if not names and not unfinished and not logs:
            raise ConfigError(f"{out} holds no run; `leukoflow run SOURCE --out {shlex.quote(out)}` makes one")
        bad = 0
        for name in names:
            try:
                with bytes_progress(console, f"verifying {name}") as report:
                    found = verify_run(root_of(out, name), report)
            except LeukoflowError as error:
                if run_id is not None:
                    raise
                bad += 1
                show_broken(console, name, str(error))  # one damaged run must not hide the others
                continue
            bad += not found.ok
            show_verification(console, found)
        for file, log in logs:
            show_audit(console, out, log, file)
            bad += bool(log.problems)
        if unfinished:
            console.print(f"[dim]not finished, so not verified: {', '.join(unfinished)}[/]", soft_wrap=True)
        if not names:
            console.print(f"[yellow]no run was verified[/]: no run in {out} is finished", soft_wrap=True)
        raise typer.Exit(1 if bad else 0)


def diff(
    run_a: Annotated[str, typer.Argument(metavar="OUT_A/RUN_A", help="The one run, folder or s3:// prefix.")],
    run_b: Annotated[str, typer.Argument(metavar="OUT_B/RUN_B", help="The other run.")],
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Everything, single images included, as JSON.")
    ] = None,
    csv_file: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="One line for every image that differs.")
    ] = None,
    tolerance: Annotated[
        float, typer.Option("--tolerance", min=0.0, help="Confidences that differ by no more than this count as equal.")
    ] = 0.0,
    debug: Debug = False,
) -> None:
    """Say what differs between two finished runs, image by image and slide by slide.

    Compares status, label, confidence, prediction set and reason; images that only one of them has; and bundle,
    settings and software. Runs over the same images are merged in their order, others are joined by image key, and
    what is left by content, so a renamed image is found again.

    **Examples**: `leukoflow diff out/smears-a out/smears-b`; `leukoflow diff out/a s3://results/b --csv changes.csv`

    **Exit codes**: 0 every image has the same outcome in both; 3 something differs; 1 anything else.
    """
    with reported(debug):
        from leukoflow.apps.cli.view.console import open_console
        from leukoflow.apps.cli.view.finished import show_diff
        from leukoflow.tasks.upkeep.diff import ChangeFiles, diff_runs

        console = open_console()
        refuse_remote(**{"--json": json_file, "--csv": csv_file})
        with ChangeFiles(csv_file, json_file) as files:
            with console.status("comparing", spinner="dots"):
                found = diff_runs(reached(run_a), reached(run_b), files.add, tolerance)
            files.finish(found)
        show_diff(console, found)
        for path in (csv_file, json_file):
            if path is not None:
                console.print(f"written  {path}", soft_wrap=True)
        raise typer.Exit(0 if found.same else 3)


def compact(
    out: Out,
    run_id: RunId,
    file_mb: Annotated[int, typer.Option("--file-mb", min=1, help="Largest merged file, MB.")] = 256,
    debug: Debug = False,
) -> None:
    """Merge the many small Parquet files of a finished run's predictions and cells into few large ones.

    Same rows, same order, same columns; the manifest lists the new files from one moment to the next. Interrupted, the
    run stays readable, and the same command finishes the work. `leukoflow run` still finds the run finished.

    **Example**: `leukoflow compact out smears-1f0c63b2`
    """
    with reported(debug):
        from leukoflow.apps.cli.view.console import open_console
        from leukoflow.apps.cli.view.finished import show_compaction
        from leukoflow.apps.cli.view.live import bytes_progress
        from leukoflow.tasks.store.compact import compact_run

        console = open_console()
        with bytes_progress(console, f"compacting {run_id}") as report:
            done = compact_run(root_of(out, run_id), file_mb << 20, report)
        show_compaction(console, done)


def retention(
    out: Out,
    keep_days: Annotated[int, typer.Option("--keep-days", min=0, help="Runs that were active within N days stay.")],
    keep_last: Annotated[
        int, typer.Option("--keep-last", min=0, help="The last N finished runs stay, however old.")
    ] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and delete nothing.")] = False,
    debug: Debug = False,
) -> None:
    """Delete old runs, finished or abandoned ones, and write down in OUT/audit.jsonl that they are gone.

    Runs in progress stay, and so do runs that a run which stays took parts from (`--reuse`). After an interruption, the
    same command goes on. `leukoflow verify OUT` checks the audit log.

    **Examples**: `leukoflow retention out --keep-days 90 --dry-run`;
    `leukoflow retention s3://results --keep-days 365 --keep-last 10`
    """
    with reported(debug):
        from leukoflow.apps.cli.view.console import open_console
        from leukoflow.apps.cli.view.finished import show_retention
        from leukoflow.tasks.upkeep.retention import plan_retention, retain

        console = open_console()
        with console.status("looking through the runs" if dry_run else "deleting", spinner="dots"):
            found = (plan_retention if dry_run else retain)(reached(out), keep_days, keep_last)
        show_retention(console, found, dry_run)


def erase(
    out: Out,
    patient: Annotated[
        str, typer.Option("--patient", metavar="ID", help="As the manifest named the patient, or the pseudonym p_...")
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would change, and change nothing.")] = False,
    debug: Debug = False,
) -> None:
    """Erase a patient from all runs of OUT; every image stays accounted for.

    The patient's rows lose patient, slide and further manifest columns; masks, features and cells of the images are
    blanked; report.html, which may show them, is deleted. `leukoflow verify` passes before and after. The audit log has
    a salted hash of the patient, not the name. The source itself is not touched: delete it where it is kept, or a run
    of it brings the patient back. Interrupted, the same command finishes.

    **Examples**: `leukoflow erase out --patient 1234 --dry-run`
    """
    with reported(debug):
        from leukoflow.apps.cli.view.console import open_console
        from leukoflow.apps.cli.view.finished import show_amended
        from leukoflow.tasks.intake.patient_key import patient_key
        from leukoflow.tasks.upkeep.erase import erase_patient
        from leukoflow.tasks.upkeep.patients import other_keys_in_words, patient_names, runs_of_other_keys

        console = open_console()
        existing(out)
        use_configured_prefect(debug)  # the key may come from a block of that server
        key = patient_key()
        names = patient_names(patient, key)
        with console.status("looking" if dry_run else "erasing", spinner="dots"):
            others = runs_of_other_keys(reached(out), patient, key)
            found = tuple(done for name in names for done in erase_patient(reached(out), name, dry_run))
        show_amended(console, found, "erased", dry_run)
        if others:
            fail(other_keys_in_words(others), 1)
