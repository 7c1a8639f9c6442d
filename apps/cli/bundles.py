"""Commands about bundles in production: the registry, shadow runs, computing a run again, correcting a patient."""

from __future__ import annotations

import shlex
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from leukoflow.apps.cli.common import (
    Commands,
    Debug,
    Out,
    RunId,
    execute,
    fail,
    prefect_api,
    reached,
    reported,
    root_of,
    use_configured_prefect,
)
from leukoflow.core.errors import ConfigError, LeukoflowError
from leukoflow.runs.layout import RunKey

bundles_app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="The bundle registry: what there is, what is approved for production, and who decided it.\n\n"
    "A registry is a folder or an s3:// prefix, named by `LEUKOFLOW_BUNDLES` or `--registry`. A run with `--bundle "
    "approved` uses the bundle that is approved when it starts, and keeps it until it ends.\n\n"
    "**Example**: `leukoflow bundles register bundles/mine --name pocket-2`",
)

RegistryOption = Annotated[
    str | None,
    typer.Option("--registry", metavar="URI", envvar="LEUKOFLOW_BUNDLES", help="Folder or s3:// prefix."),
]
By = Annotated[str | None, typer.Option("--by", metavar="WHO", help="Who decides. Default: this user on this host.")]
Wanted = Annotated[str, typer.Argument(metavar="DIGEST|NAME", help="As `leukoflow bundles list` shows it.")]


def add_to(app: typer.Typer) -> None:
    """Add the commands of this module to the command line."""
    app.add_typer(bundles_app, name="bundles")
    for command in (shadow, rerun, correct):
        app.command()(command)


def _registry(uri: str | None) -> Any:
    from leukoflow.models.registry import opened

    return opened(uri)


def _who(by: str | None) -> str:
    from leukoflow.cluster.host import who

    return by or who()


def _line(bundle: Any, what: str) -> None:
    from leukoflow.apps.cli.view.console import open_console

    open_console().print(f"{bundle.name}  {bundle.digest[:12]}  {what}", soft_wrap=True, markup=False)


@bundles_app.command("register")
def register(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="Folder of the bundle.")],
    name: Annotated[str | None, typer.Option("--name", help="Name in the registry. Default: the bundle's own.")] = None,
    without_metrics: Annotated[
        str, typer.Option("--without-metrics", metavar="WHY", help="Register a bundle that nobody has evaluated.")
    ] = "",
    by: By = None,
    registry: RegistryOption = None,
    debug: Debug = False,
) -> None:
    """Check a bundle, copy it into the registry under its digest, and enter it; it is not approved yet.

    Registering it again after `leukoflow evaluate` enters its new metrics.

    **Example**: `leukoflow bundles register bundles/mine --name pocket-2`
    """
    with reported(debug):
        found = _registry(registry).register(directory, _who(by), name, without_metrics)
        _line(found, found.state)


@bundles_app.command("list")
def list_bundles(registry: RegistryOption = None, debug: Debug = False) -> None:
    """List the bundles: name, digest, state, when and by whom, and the figures that were measured."""
    with reported(debug):
        from rich.table import Table

        from leukoflow.apps.cli.view.console import open_console

        table = Table(box=None, padding=(0, 2), header_style="dim")
        for title in ("name", "digest", "state", "registered", "by", "metrics"):
            table.add_column(title, overflow="fold")
        for b in _registry(registry).state().bundles:
            figures = ", ".join(f"{name} {value:.3f}" for name, value in b.metrics) or f"none: {b.note}"
            style = "bold green" if b.state == "approved" else "dim" if b.state == "removed" else ""
            table.add_row(b.name, b.digest[:12], b.state, b.at, b.by, figures, style=style)
        open_console().print(table)


@bundles_app.command("approve")
def approve(
    wanted: Wanted,
    by: Annotated[str, typer.Option("--by", metavar="WHO", help="Who approves it.")],
    why: Annotated[str, typer.Option("--why", metavar="TEXT", help="On what grounds.")],
    registry: RegistryOption = None,
    debug: Debug = False,
) -> None:
    """Make a registered bundle the one that runs with `--bundle approved` use from now on.

    Runs that have started keep theirs.

    **Example**: `leukoflow bundles approve pocket-2 --by "Dr Moreau" --why "shadow runs of two weeks agree"`
    """
    with reported(debug):
        _line(_registry(registry).approve(wanted, by, why), "is approved")


@bundles_app.command("rollback")
def rollback(
    to: Annotated[
        str | None, typer.Option("--to", metavar="DIGEST|NAME", help="An earlier one. Default: the one before.")
    ] = None,
    by: By = None,
    why: Annotated[str, typer.Option("--why", metavar="TEXT", help="For the history.")] = "",
    registry: RegistryOption = None,
    debug: Debug = False,
) -> None:
    """Approve again the bundle that was approved before the present one."""
    with reported(debug):
        _line(_registry(registry).rollback(_who(by), why, to), "is approved again")


@bundles_app.command("history")
def history(registry: RegistryOption = None, debug: Debug = False) -> None:
    """Print everything that was ever done to the registry. Fails when the history was tampered with."""
    with reported(debug):
        from rich.table import Table

        from leukoflow.apps.cli.view.console import open_console

        table = Table(box=None, padding=(0, 2), header_style="dim")
        for title in ("", "when", "who", "what", "bundle", "digest", "why"):
            table.add_column(title, overflow="fold")
        for e in _registry(registry).entries():
            table.add_row(str(e.number), e.at, e.by, e.action, e.name, e.digest[:12], e.why)
        open_console().print(table)


@bundles_app.command("prune")
def prune(
    keep_days: Annotated[
        int, typer.Option("--keep-days", min=0, help="Bundles whose state changed within N days stay.")
    ],
    out: Annotated[
        list[str], typer.Option("--out", "-o", help="Every folder or s3:// prefix that holds runs; may be repeated.")
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and remove nothing.")] = False,
    by: By = None,
    registry: RegistryOption = None,
    debug: Debug = False,
) -> None:
    """Remove bundles that nothing needs: neither approved, nor a rollback away, nor that of a run that is kept.

    Every run in the folders that --out names counts; a folder that is not named is not looked at.

    **Example**: `leukoflow bundles prune --keep-days 180 --out s3://results --dry-run`
    """
    with reported(debug):
        from leukoflow.apps.cli.view.console import open_console
        from leukoflow.tasks.upkeep.prune import prune as remove

        for v in remove(_registry(registry), out, keep_days, _who(by), dry_run):
            word = ("would be removed" if dry_run else "removed") if v.remove else "stays"
            _line(v.bundle, f"{word}: {v.why}")
        if dry_run:
            open_console().print("nothing was removed")


def shadow(
    out: Out,
    run_id: Annotated[
        str | None, typer.Argument(metavar="[RUN_ID]", help="The finished run; without it, the newest in OUT.")
    ] = None,
    bundle: Annotated[str, typer.Option("--bundle", help="The candidate: a name, a folder, or `registry:NAME`.")] = "",
    workers: Annotated[int | None, typer.Option("--workers", min=0, help="Local worker processes.")] = None,
    cluster: Annotated[str | None, typer.Option("--cluster", metavar="ADDRESS", help="A Dask scheduler.")] = None,
    keep_prefect: Annotated[
        bool, typer.Option("--keep-prefect", help="Leave the Prefect server that this starts running.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Let a candidate bundle see what a finished run has seen, and say what it would have changed.

    The shadow run RUN_ID-shadow-DIGEST takes over masks and features where the candidate computes them alike, runs at
    low priority, and is never the night's result. `shadow.json` in it has the numbers; `leukoflow diff` names the
    images.

    **Example**: `leukoflow shadow out smears-1f0c63b2 --bundle registry:pocket-2`
    """
    with reported(debug):
        from leukoflow.apps.cli.view.console import open_console
        from leukoflow.apps.cli.view.live import live_progress, show_plan

        if not bundle:
            raise ConfigError("--bundle names the candidate; `leukoflow bundles list` shows those of the registry")
        console = open_console()
        use_configured_prefect(debug)
        from leukoflow.runs.heart import beating
        from leukoflow.runs.progress import read_manifest
        from leukoflow.storage.opening import open_storage
        from leukoflow.tasks.intake.open_run import open_run
        from leukoflow.tasks.upkeep.shadow import ShadowSummary, shadow_config

        config = shadow_config(out, run_id, bundle, workers, cluster)
        with ExitStack() as life:
            opened = open_run(config, lambda root: life.enter_context(beating(root, "planning the source")))
            show_plan(console, opened.run_id, opened.root, opened.summary)
            life.enter_context(prefect_api(keep_prefect, debug))
            life.enter_context(live_progress(console, opened.root))
            from prefect import tags

            from leukoflow.flows.shadow import shadow as flow

            with tags("leukoflow", "shadow", f"run:{opened.run_id}"):
                state = flow(out, config.shadow_of, bundle, workers, cluster, return_state=True)
        storage = open_storage(opened.root)
        if not state.is_completed():
            outcome = state.result(raise_on_failure=False)
            if isinstance(outcome, BaseException):
                raise outcome
        if read_manifest(storage) is None:
            raise LeukoflowError(f"run {opened.run_id} ended without a manifest: {state.message or state.name}")
        from leukoflow.core.codec import loads

        found = loads(ShadowSummary, storage.read(RunKey.SHADOW), storage.uri(RunKey.SHADOW))
        slides = "1 slide is" if found.slides_moved == 1 else f"{found.slides_moved:,} slides are"
        console.print(
            f"{found.moved:,} of {found.images:,} images would get another label or status, {found.changed:,} differ "
            f"in some way; {slides} affected",
            soft_wrap=True,
        )
        for before, after, n in found.transitions:
            if before != after:
                console.print(f"  {n:>7,}  {before} -> {after}", soft_wrap=True)
        command = shlex.join(["leukoflow", "diff", root_of(out, found.shadow_of), opened.root])
        console.print(f"images  {command}", soft_wrap=True, markup=False)


def rerun(
    out: Out,
    run_id: RunId,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compute the finished run again elsewhere, and compare.")
    ] = False,
    shards: Annotated[
        int | None,
        typer.Option("--shards", min=1, help="With --verify: only N shards, chosen by --seed. Default: all."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="With --verify: decides which shards are chosen.")] = 0,
    workers: Annotated[
        int | None, typer.Option("--workers", min=0, help="Processes; 0 is one per core. Default: as the run had it.")
    ] = None,
    bundle: Annotated[
        str | None,
        typer.Option("--bundle", help="With --verify: where the run's bundle is now, if it is not where it was."),
    ] = None,
    registry: RegistryOption = None,
    scratch: Annotated[
        Path | None,
        typer.Option("--scratch", help="With --verify: folder for what is computed. Default: the temporary folder."),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="With --verify: everything that was found, as JSON.")
    ] = None,
    keep_prefect: Annotated[
        bool, typer.Option("--keep-prefect", help="Leave the Prefect server that this run starts running.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Take up a run by its id: only what is missing or failed is done, with the settings that it started with.

    With --verify, compute a finished run again from its source with its bundle, and compare bit for bit: predictions,
    cells, masks, features and activation maps of all shards, or of a seeded sample, are held against what is stored. On
    the same kind of machine with the same software nothing may differ; else it is said how far the numbers are apart,
    and what is different here. The run is not touched. --shards, --seed, --bundle, --registry, --scratch and
    --json belong to it.

    **Examples**: `leukoflow rerun out ward-2026-03-01`; `leukoflow rerun out smears-1f0c63b2 --verify --shards 3`

    **Exit codes**: as `leukoflow run`; with --verify 0 the same to the last bit, 3 something differs, 1 anything else.
    """
    with reported(debug):
        if not verify:
            if shards is not None or bundle is not None or scratch is not None or json_file is not None:
                raise ConfigError("--shards, --bundle, --scratch and --json belong to --verify")
            from leukoflow.flows.rerun import rerun_config

            settings = rerun_config(out, run_id)
            if workers is not None:
                cluster = settings.cluster.model_copy(update={"workers": workers})
                settings = settings.model_copy(update={"cluster": cluster})
            raise typer.Exit(execute(settings, keep_prefect, debug))
        from leukoflow.apps.cli.view.console import open_console
        from leukoflow.tasks.upkeep.reproduce import reproduce_run, to_json

        console = open_console()
        with console.status("computing again", spinner="dots") as status:

            def report(done: int, total: int) -> None:
                status.update(f"computing again: {done} of {total} shards")

            found = reproduce_run(
                root_of(out, run_id),
                shards,
                seed,
                workers or 0,
                bundle,
                registry,
                str(scratch) if scratch else None,
                report,
            )
        if json_file is not None:
            json_file.write_text(to_json(found), encoding="utf-8")
        show_reproduction(console, found)
        raise typer.Exit(0 if found.same else 3)


_SHOWN = 30


def show_reproduction(console: Any, found: Any) -> None:
    """Show what computing a run again has found."""
    compared = sum(n for _, n in found.values)
    console.print(
        f"{found.run_id}: {len(found.shards):,} of {found.of_shards:,} shards with {found.images:,} images computed "
        f"again in {found.seconds:.0f} s, {compared:,} values compared",
        soft_wrap=True,
    )
    if found.left_out:
        console.print(f"left out: {found.left_out:,} images of patients that were erased", soft_wrap=True)
    for note in found.notes:
        console.print(f"note: {note}", soft_wrap=True, markup=False)
    if found.not_stored:
        console.print(f"not stored, so not compared: {', '.join(found.not_stored[:5])}", soft_wrap=True)
    for what, then, now in found.environment:
        console.print(f"different here: {what}: {then} then, {now} now", soft_wrap=True, markup=False)
    if found.same and not compared:
        console.print("[yellow]nothing was compared[/]: no value of the run could be computed again")
        return
    if found.same:
        console.print("[green]all the same, to the last bit[/]")
        return
    for d in found.differences[:_SHOWN]:
        far = "" if d.largest is None else f", by at most {d.largest:.3g}"
        console.print(f"shard {d.shard}  {d.where}: {d.values:,} of {d.of:,} values differ{far}", soft_wrap=True)
    if len(found.differences) > _SHOWN:
        console.print(f"and {len(found.differences) - _SHOWN:,} more arrays and columns")
    if not found.environment:
        console.print(
            "[red]software and machine are those of the run, so nothing should differ[/]: `leukoflow verify` tells "
            "whether what is stored was altered; if not, it is a bug in the program or a fault of this machine",
            soft_wrap=True,
        )


def correct(
    out: Out,
    patient: Annotated[
        str | None,
        typer.Option(
            "--patient", metavar="ID", help="With --to: who was assigned wrongly. With --slide alone: who is right."
        ),
    ] = None,
    to: Annotated[str | None, typer.Option("--to", metavar="ID", help="The right patient.")] = None,
    slide: Annotated[
        str | None, typer.Option("--slide", metavar="ID", help="The slide whose images are meant.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would change, and change nothing.")] = False,
    debug: Debug = False,
) -> None:
    """Assign images to the right patient in all runs of OUT: those of a patient, of a slide, or of both.

    Plan, predictions, missing and mixed-up images name the right patient, and the slides are ranked again; what was
    computed from pixels stays. Patients are given as the manifest named them, or as pseudonyms p_... `leukoflow verify`
    passes before and after. Correct the manifest as well, or the next run of the source brings the mistake back.
    Interrupted, the same command finishes.

    **Examples**: `leukoflow correct out --patient 1234 --to 4321 --dry-run`;
    `leukoflow correct out --slide S-77 --patient 4321`
    """
    with reported(debug):
        from leukoflow.apps.cli.view.console import open_console
        from leukoflow.apps.cli.view.finished import show_amended
        from leukoflow.tasks.intake.patient_key import patient_key
        from leukoflow.tasks.upkeep.correct import correct_patient
        from leukoflow.tasks.upkeep.patients import other_keys_in_words, patient_name, runs_of_other_keys

        wrong, right = (patient, to) if to is not None else (None, patient if slide is not None else None)
        if right is None or (wrong is None and slide is None):
            raise ConfigError("name the right patient: --patient WRONG --to RIGHT, or --slide SLIDE --patient RIGHT")
        console = open_console()
        use_configured_prefect(debug)  # the key may come from a block of that server
        key = patient_key()
        named = [None if p is None else patient_name(p, key) for p in (right, wrong)]
        assert named[0] is not None
        with console.status("looking" if dry_run else "correcting", spinner="dots"):
            others = tuple(
                {run: None for p in (wrong, right) if p is not None for run in runs_of_other_keys(reached(out), p, key)}
            )
            keyed = None if named[0] == right else key  # a pseudonym needs none
            found = correct_patient(reached(out), named[0], named[1], slide, dry_run, keyed)
        show_amended(console, found, "corrected", dry_run)
        if others:
            fail(other_keys_in_words(others), 1)
