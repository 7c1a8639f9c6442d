"""The command line. Each command imports what it needs when it runs, so that `--help` answers at once."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from leukoflow.apps.cli import bundles as cli_bundles
from leukoflow.apps.cli import exports as cli_verdicts
from leukoflow.apps.cli import monitor as cli_nights
from leukoflow.apps.cli import site as cli_night
from leukoflow.apps.cli import web as cli_web
from leukoflow.apps.cli.automations import automations_app
from leukoflow.apps.cli.common import (
    Commands,
    Debug,
    Out,
    RunId,
    execute,
    existing,
    fail,
    prefect_api,
    reached,
    refuse_remote,
    reported,
    require_named,
    root_of,
    use_configured_prefect,
)
from leukoflow.core.errors import ConfigError, LeukoflowError

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Nightly batch inference on blood smears: for every image that was handed over, a calibrated prediction with "
    "its evidence, or the reason why there is none. Research use only.\n\n"
    "Start with `leukoflow sample demo` and the command that it prints.",
)
prefect_app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="A local Prefect server that stays, for its dashboard.\n\n"
    "`leukoflow run` starts a server for itself when none is configured, and stops it at the end. One that was started "
    "here is used instead and keeps running, so that its dashboard shows all runs.",
)
app.add_typer(prefect_app, name="prefect")
app.add_typer(automations_app, name="automations")


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version as installed

        typer.echo(f"leukoflow {installed('leukoflow')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end."),
    ] = False,
) -> None:
    """Options of the command itself; what it is for is said where `app` is made."""


def main() -> None:
    """Entry point of the `leukoflow` command."""
    app(prog_name="leukoflow")


# --- run -------------------------------------------------------------------------------------------------------------


@app.command()
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


# --- status, report --------------------------------------------------------------------------------------------------


@app.command()
def status(
    out: Out,
    run_id: Annotated[
        str | None, typer.Argument(metavar="[RUN_ID]", help="One run; without it, all runs in OUT.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Say how far runs are: running, killed, stopped, failed and finished ones.

    Without RUN_ID a line for every run in OUT; with it, its progress stage by stage, its last sign of life, what
    failed, and the command that resumes it. Reads only what the run has committed, so it works from any machine
    that sees OUT.

    **Examples**: `leukoflow status out`; `leukoflow status out smears-1f0c63b2`
    """
    with reported(debug):
        from leukoflow.apps.cli import view
        from leukoflow.runs.progress import list_runs, read_progress

        console = view.console()
        existing(out)
        if run_id is None:
            runs = list_runs(reached(out))
            if not runs:
                raise ConfigError(f"{out} holds no run; `leukoflow run SOURCE --out {shlex.quote(out)}` makes one")
            found, damaged = [], []
            for name in runs:
                try:
                    found.append(read_progress(root_of(out, name)))
                except LeukoflowError as error:  # one damaged run must not hide the others
                    damaged.append((name, str(error)))
            view.show_runs(console, out, found, damaged)
        else:
            view.show_status(console, root_of(out, run_id), read_progress(root_of(out, run_id)))


@app.command()
def report(
    out: Out,
    run_id: Annotated[
        str | None, typer.Argument(metavar="[RUN_ID]", help="One run; without it, the last nights of all runs.")
    ] = None,
    nights: Annotated[int, typer.Option("--nights", min=1, help="How many nights to show, without RUN_ID.")] = 30,
    to: Annotated[
        str | None, typer.Option("--to", metavar="FILE", help="Where to write the page of the nights.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Write the report of a run anew, or without RUN_ID that of the last nights.

    With RUN_ID: OUT/RUN_ID/report.html, also while the run is running or after it was killed. One file without anything
    external: totals, distributions, timings, the ranking of the slides, and the most suspicious and the least certain
    fields with their cells outlined. The outlines need the source; where it is gone, the masks are shown alone.

    Without: OUT/nights.html, and the same as nights.json. Reconciliation of each night, rates, throughput, and drift
    against the reference (`leukoflow drift reference`) and the week before, by site and scanner.

    **Examples**: `leukoflow report out smears-1f0c63b2`; `leukoflow report s3://results --nights 30 --to nights.html`
    """
    with reported(debug):
        if run_id is None:
            from leukoflow.apps.cli.monitor import report_nights

            return report_nights(out, nights, to)
        if to is not None:
            raise ConfigError("--to is for the page of the nights; the report of one run lies beside its data")
        from leukoflow.apps.cli import view
        from leukoflow.runs.progress import ProgressReader
        from leukoflow.tasks.report.run_report import build_report

        root = root_of(out, run_id)
        reader = ProgressReader(root)
        progress = reader.read()
        reader.storage.write("report.html", build_report(root, reader.manifest()).encode())
        view.console().print(f"{reader.storage.uri('report.html')}  ({progress.state})", soft_wrap=True)


# --- the life of a finished run --------------------------------------------------------------------------------------


@app.command()
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
        from leukoflow.apps.cli import view
        from leukoflow.tasks.upkeep.audit import LOG, WEB_LOG, verify_log
        from leukoflow.tasks.upkeep.verify import finished_runs, verify_run

        console = view.console()
        names, unfinished = ([run_id], []) if run_id is not None else finished_runs(existing(out))
        logs = [(file, log) for file in (LOG, WEB_LOG) if (log := verify_log(out, file)) is not None]
        if not names and not unfinished and not logs:
            raise ConfigError(f"{out} holds no run; `leukoflow run SOURCE --out {shlex.quote(out)}` makes one")
        bad = 0
        for name in names:
            try:
                with view.bytes_progress(console, f"verifying {name}") as report:
                    found = verify_run(root_of(out, name), report)
            except LeukoflowError as error:
                if run_id is not None:
                    raise
                bad += 1
                view.show_broken(console, name, str(error))  # one damaged run must not hide the others
                continue
            bad += not found.ok
            view.show_verification(console, found)
        for file, log in logs:
            view.show_audit(console, out, log, file)
            bad += bool(log.problems)
        if unfinished:
            console.print(f"[dim]not finished, so not verified: {', '.join(unfinished)}[/]", soft_wrap=True)
        if not names:
            console.print(f"[yellow]no run was verified[/]: no run in {out} is finished", soft_wrap=True)
        raise typer.Exit(1 if bad else 0)


@app.command()
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
        float, typer.Option("--tolerance", min=0.0, help="Confidences that differ by no more than this are the same.")
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
        from leukoflow.apps.cli import view
        from leukoflow.tasks.upkeep.diff import ChangeFiles, diff_runs

        console = view.console()
        refuse_remote(**{"--json": json_file, "--csv": csv_file})
        with ChangeFiles(csv_file, json_file) as files:
            with console.status("comparing", spinner="dots"):
                found = diff_runs(reached(run_a), reached(run_b), files.add, tolerance)
            files.finish(found)
        view.show_diff(console, found)
        for path in (csv_file, json_file):
            if path is not None:
                console.print(f"written  {path}", soft_wrap=True)
        raise typer.Exit(0 if found.same else 3)


@app.command()
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
        from leukoflow.apps.cli import view
        from leukoflow.tasks.store.compact import compact_run

        console = view.console()
        with view.bytes_progress(console, f"compacting {run_id}") as report:
            done = compact_run(root_of(out, run_id), file_mb << 20, report)
        view.show_compaction(console, done)


@app.command()
def retention(
    out: Out,
    keep_days: Annotated[int, typer.Option("--keep-days", min=0, help="Runs that were active within N days stay.")],
    keep_last: Annotated[int, typer.Option("--keep-last", min=0, help="So many finished runs stay, however old.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and delete nothing.")] = False,
    debug: Debug = False,
) -> None:
    """Delete old runs, finished or abandoned ones, and write down in OUT/audit.jsonl that they are gone.

    Runs in progress stay, and so do runs that another one, which stays, was told to `--reuse`. Interrupted, the same
    command goes on. `leukoflow verify OUT` checks the audit log.

    **Examples**: `leukoflow retention out --keep-days 90 --dry-run`;
    `leukoflow retention s3://results --keep-days 365 --keep-last 10`
    """
    with reported(debug):
        from leukoflow.apps.cli import view
        from leukoflow.tasks.upkeep.retention import plan_retention, retain

        console = view.console()
        with console.status("looking through the runs" if dry_run else "deleting", spinner="dots"):
            found = (plan_retention if dry_run else retain)(reached(out), keep_days, keep_last)
        view.show_retention(console, found, dry_run)


@app.command()
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
        from leukoflow.apps.cli import view
        from leukoflow.tasks.intake.patient_key import patient_key
        from leukoflow.tasks.upkeep.amend import other_keys_in_words, patient_names, runs_of_other_keys
        from leukoflow.tasks.upkeep.erase import erase_patient

        console = view.console()
        existing(out)
        use_configured_prefect(debug)  # the key may come from a block of that server
        key = patient_key()
        names = patient_names(patient, key)
        with console.status("looking" if dry_run else "erasing", spinner="dots"):
            others = runs_of_other_keys(reached(out), patient, key)
            found = tuple(done for name in names for done in erase_patient(reached(out), name, dry_run))
        view.show_amended(console, found, "erased", dry_run)
        if others:
            fail(other_keys_in_words(others), 1)


# --- doctor ----------------------------------------------------------------------------------------------------------


@app.command()
def doctor(
    out: Annotated[str | None, typer.Option("--out", "-o", help="Where runs are to be written.")] = None,
    bundle: Annotated[
        str, typer.Option("--bundle", help="Name, directory or s3:// prefix of the model bundle.")
    ] = "pocket",
    cluster: Annotated[
        str | None, typer.Option("--cluster", metavar="ADDRESS", help="The Dask scheduler to use.")
    ] = None,
    start_prefect: Annotated[
        bool, typer.Option("--start/--no-start", help="Start a Prefect server for a moment if none is configured.")
    ] = True,
    debug: Debug = False,
) -> None:
    """Check what a run needs, and say what to do about what is not right.

    Versions, Prefect server, Dask scheduler, storage, bundle, decoding process, disk, memory, cores and GPU. Exits
    with 1 when a check failed; warnings do not count.

    **Examples**: `leukoflow doctor`; `leukoflow doctor --out s3://results --cluster tcp://gpu1:8786`
    """
    with reported(debug):
        from leukoflow.apps.cli import view
        from leukoflow.apps.doctor import diagnose

        console = view.console()
        use_configured_prefect(debug)  # the patient key may come from a block of that server
        with console.status("checking", spinner="dots"):
            checks = diagnose(out, bundle, cluster, start_prefect)
        view.show_checks(console, checks)
        raise typer.Exit(1 if any(c.verdict == "fail" for c in checks) else 0)


# --- sample ----------------------------------------------------------------------------------------------------------


@app.command()
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
        from leukoflow.apps.cli import view
        from leukoflow.tasks.imaging.synthetic import write_sample

        refuse_remote(DIR=directory)
        console = view.console()
        with console.status(f"rendering {images:,} fields", spinner="dots"):
            made = write_sample(directory, images, seed, side)
        console.print(
            f"{made.images:,} fields of {made.slides:,} slides with {made.cells:,} white cells in {made.archive}",
            soft_wrap=True,
            highlight=False,
        )
        console.print(f"next: {next_command(made.archive, made.manifest)}", soft_wrap=True, markup=False)


def next_command(archive: Path, manifest: Path) -> str:
    """The command that screens a sample, as the README has it."""
    return shlex.join(["leukoflow", "run", str(archive), "--out", "out", "--manifest", str(manifest)])


# --- train -----------------------------------------------------------------------------------------------------------


@app.command()
def train(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="Folder with the labelled fields and the masked cells.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the bundle that is written.")],
    work: Annotated[
        Path | None, typer.Option("--work", help="Folder of the checkpoints. Default: beside the bundle, OUT.work.")
    ] = None,
    preset: Annotated[str, typer.Option("--preset", help="pocket (a laptop's CPU) or full (a GPU).")] = "pocket",
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of every random draw.")] = 0,
    minutes: Annotated[
        float | None, typer.Option("--minutes", help="About how long the networks may train on two cores.")
    ] = None,
    without: Annotated[
        list[str] | None,
        typer.Option(
            "--without",
            metavar="PART",
            help="For ablation, any of: mask_overlays reinhard clahe multiscale unet convnext nasnet select attention.",
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option("--weights", help="Pretrained backbones: hub, a file or a folder. Default: distil them."),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option("--teacher", help="Weights of the network to distil from. Default: those of leukoflow[train]."),
    ] = None,
    threads: Annotated[int, typer.Option("--threads", min=1, help="Processor threads in all.")] = 2,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
    name: Annotated[str | None, typer.Option("--name", help="Name of the bundle. Default: that of its folder.")] = None,
    keep_prefect: Annotated[
        bool, typer.Option("--keep-prefect", help="Leave the Prefect server that this starts running.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Train a model bundle: segmenter, both backbones, feature selection, classifier and calibration.

    One command for all phases. Each keeps a checkpoint, so the same command continues an interrupted training, also
    in the middle of a phase. Segmenter and backbones learn without class labels; what a label touches is fitted last,
    and `leukoflow evaluate` fits it anew inside every fold.

    **Example**: `leukoflow train data --out bundles/mine`
    """
    with reported(debug):
        refuse_remote(DATA=data, **{"--out": out, "--work": work})
        work_dir = work or out.with_name(out.name + ".work")
        with prefect_api(keep_prefect, debug):
            from leukoflow.flows.train import FULL_MINUTES
            from leukoflow.flows.train import train as flow

            digest = flow(
                data_dir=data,
                out_dir=out,
                work_dir=work_dir,
                preset_name=preset,
                seed=seed,
                minutes=FULL_MINUTES if minutes is None else minutes,
                without=tuple(without or ()),
                weights=weights,
                teacher=teacher,
                threads=threads,
                device=device,
                name=name,
            )
        from leukoflow.apps.cli import view

        console = view.console()
        console.print(f"bundle {out}, digest {digest[:12]}", soft_wrap=True)
        command = shlex.join(["leukoflow", "evaluate", str(out), str(data), "--out", "evaluation"])
        console.print(f"next: {command}", soft_wrap=True, markup=False)


PROTOCOL_NAMES: tuple[Literal["random", "slide", "cluster"], ...] = ("random", "slide", "cluster")


@app.command()
def evaluate(
    bundle: Annotated[str, typer.Argument(metavar="BUNDLE", help="Name, folder or s3:// prefix of a bundle.")],
    data: Annotated[Path, typer.Argument(metavar="DATA", help="Folder with the labelled fields.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of evaluation.html and evaluation.json.")],
    work: Annotated[
        Path | None, typer.Option("--work", help="Folder of intermediate results. Default: OUT.work.")
    ] = None,
    protocol: Annotated[
        list[str] | None, typer.Option("--protocol", help="cluster, slide or random; may be repeated. Default: all.")
    ] = None,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Of the cluster-grouped folds, five each.")] = 4,
    ablations: Annotated[
        bool, typer.Option("--ablations/--no-ablations", help="Leave out each part of the method in turn.")
    ] = True,
    probes: Annotated[
        bool, typer.Option("--probes/--no-probes", help="Change fields on purpose: does the answer rest on cells?")
    ] = True,
    robustness: Annotated[
        bool, typer.Option("--robustness/--no-robustness", help="Damage fields: blur, JPEG, stain, exposure, scale.")
    ] = True,
    threads: Annotated[int, typer.Option("--threads", min=1, help="Worker processes.")] = 2,
    record: Annotated[
        bool, typer.Option("--record/--no-record", help="Put the figures into the bundle, whose digest stays the same.")
    ] = True,
    keep_prefect: Annotated[
        bool, typer.Option("--keep-prefect", help="Leave the Prefect server that this starts running.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Cross-validate the recipe of a bundle, beside baselines that know no cells, and measure the bundle's masks.

    Whole clusters of photographs are held out, then whole slides, then random fields; everything that a label touches
    is fitted inside each fold. Interrupted, the same command goes on.

    **Example**: `leukoflow evaluate pocket data --out evaluation`
    """
    with reported(debug):
        if unknown := sorted(set(protocol or ()) - set(PROTOCOL_NAMES)):
            raise ConfigError(f"no protocol named {unknown[0]!r}; there are cluster, slide and random")
        refuse_remote(DATA=data, **{"--out": out, "--work": work})
        if record and bundle.startswith("s3://"):
            raise ConfigError(f"figures cannot be put into {bundle}: give --no-record, or a copy on the local disk")
        with prefect_api(keep_prefect, debug):
            from leukoflow.flows.evaluate import evaluate as flow

            found = flow(
                bundle=bundle,
                data_dir=data,
                out=out,
                work=work,
                protocols=tuple(p for p in PROTOCOL_NAMES if protocol is None or p in protocol),
                repeats=repeats,
                ablations=ablations,
                probes=probes,
                robustness=robustness,
                threads=threads,
                record=record,
            )
        from leukoflow.apps.cli import view

        view.show_evaluation(view.console(), found)
        view.console().print(f"page  {out / 'evaluation.html'}", soft_wrap=True)


# --- prefect ---------------------------------------------------------------------------------------------------------


@prefect_app.command("start")
def prefect_start(debug: Debug = False) -> None:
    """Start a Prefect server on this machine that stays until it is stopped.

    It listens on the loopback address only, keeps its database below the user's state directory
    (`LEUKOFLOW_PREFECT_HOME` names another place), and sends nothing anywhere.
    """
    with reported(debug):
        from leukoflow.apps import prefect_server
        from leukoflow.apps.cli import view

        console = view.console()
        with console.status("starting a Prefect server", spinner="dots"):
            server = prefect_server.start_server(keep=True)
        console.print(f"dashboard  {server.ui_url}\nlog        {server.log}", soft_wrap=True)
        console.print(f"runs use it by themselves; other programs with PREFECT_API_URL={server.url}", soft_wrap=True)


@prefect_app.command("status")
def prefect_status(debug: Debug = False) -> None:
    """Say which Prefect server a run would use. Exits with 1 when one is configured and does not answer."""
    with reported(debug):
        from leukoflow.apps import prefect_server
        from leukoflow.apps.cli import view

        console = view.console()
        if url := prefect_server.configured_api_url():
            answers = prefect_server.is_healthy(url)
            console.print(f"configured: {url} ({'answers' if answers else 'does not answer'})", soft_wrap=True)
            raise typer.Exit(0 if answers else 1)
        server = prefect_server.running_server()
        if server is None:
            console.print(
                "none is running; `leukoflow run` starts one for itself, `leukoflow prefect start` one that stays"
            )
        else:
            console.print(f"running at {server.ui_url} (process {server.pid}, log {server.log})", soft_wrap=True)


@prefect_app.command("stop")
def prefect_stop(debug: Debug = False) -> None:
    """Stop the server that `leukoflow prefect start` or `run --keep-prefect` left running."""
    with reported(debug):
        from leukoflow.apps import prefect_server
        from leukoflow.apps.cli import view

        view.console().print("stopped" if prefect_server.stop() else "none was running")


# --- version ---------------------------------------------------------------------------------------------------------


@app.command()
def version() -> None:
    """Print the version of leukoflow and of what decides its numbers."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    for name in ("leukoflow", "prefect", "distributed", "torch", "timm", "opencv-python-headless", "zarr", "pyarrow"):
        try:
            typer.echo(f"{name} {installed(name)}")
        except PackageNotFoundError:
            typer.echo(f"{name} not installed")
    typer.echo(f"python {sys.version.split()[0]}")


for _module in (cli_night, cli_nights, cli_bundles, cli_verdicts, cli_web):
    _module.add_to(app)

if __name__ == "__main__":
    main()
