"""The command line and its groups. Commands import what they need when they run, so that `--help` answers at once."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from leukoflow.apps.cli import bundles, doctor, exports, finished, monitor, run, sample, site, status, training, web
from leukoflow.apps.cli.automations import automations_app
from leukoflow.apps.cli.common import Commands
from leukoflow.apps.cli.prefect import prefect_app

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


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version as installed

        typer.echo(f"leukoflow {installed('leukoflow')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Read the options of the command itself; what it is for is said where `app` is made."""


def main() -> None:
    """Run the `leukoflow` command."""
    app(prog_name="leukoflow")


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


def _add_commands() -> None:
    """Add all commands, in the order in which `--help` lists them."""
    app.add_typer(prefect_app, name="prefect")
    app.add_typer(automations_app, name="automations")
    for module in (run, status, finished, doctor, sample, training):
        module.add_to(app)
    app.command()(version)
    for module in (site, monitor, bundles, exports, web):
        module.add_to(app)


_add_commands()

if __name__ == "__main__":
    main()
