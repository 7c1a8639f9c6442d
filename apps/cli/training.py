"""Commands that make a model bundle and measure it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

from leukoflow.apps.cli.common import Debug, prefect_api, refuse_remote, reported
from leukoflow.core.errors import ConfigError


def add_to(app: typer.Typer) -> None:
    """Add the commands of this module to the command line."""
    for command in (train, evaluate):
        app.command()(command)


def train(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="Folder with the labelled fields and the masked cells.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the bundle that is written.")],
    work: Annotated[
        Path | None, typer.Option("--work", help="Folder of the checkpoints. Default: beside the bundle, OUT.work.")
    ] = None,
    preset: Annotated[str, typer.Option("--preset", help="pocket (a laptop's CPU) or full (a GPU).")] = "pocket",
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of every random draw.")] = 0,
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
    threads: Annotated[int, typer.Option("--threads", min=1, help="Processor threads in total.")] = 2,
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
    and `leukoflow evaluate` fits it again inside every fold.

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
        from leukoflow.apps.cli.view.console import open_console

        console = open_console()
        console.print(f"bundle {out}, digest {digest[:12]}", soft_wrap=True)
        command = shlex.join(["leukoflow", "evaluate", str(out), str(data), "--out", "evaluation"])
        console.print(f"next: {command}", soft_wrap=True, markup=False)


PROTOCOL_NAMES: tuple[Literal["random", "slide", "cluster"], ...] = ("random", "slide", "cluster")


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
    repeats: Annotated[
        int, typer.Option("--repeats", min=1, help="Repeats of the cluster-grouped folds, five folds each.")
    ] = 4,
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
        from leukoflow.apps.cli.view.console import open_console
        from leukoflow.apps.cli.view.evaluation import show_evaluation

        show_evaluation(open_console(), found)
        open_console().print(f"page  {out / 'evaluation.html'}", soft_wrap=True)
