"""What all commands share: words of the command line, errors as one line, and a Prefect server for a block."""

from __future__ import annotations

import importlib
import json
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from leukoflow.core.errors import QUOTING, ConfigError, LeukoflowError
from leukoflow.core.extras import how_to_install

if TYPE_CHECKING:
    from rich.console import Console

    from leukoflow.core.config import RunConfig
    from leukoflow.tasks.intake.binding import Run

ROOT_FILE = "LEUKOFLOW_ROOT_FILE"
"""Environment variable that names a file into which `run` writes where its run lies; `leukoflow.run` reads it."""
_USAGE = 1  # a mistyped command; 2 is taken by an unusable source
Debug = Annotated[bool, typer.Option("--debug", help="Show Prefect's log and the traceback of an error.")]
Out = Annotated[str, typer.Argument(metavar="OUT", help="The folder or s3:// prefix that was given to `run --out`.")]
RunId = Annotated[str, typer.Argument(metavar="RUN_ID", help="The run, as `leukoflow status OUT` lists it.")]


class Commands(TyperGroup):
    """Exits with 1 for a command that cannot be understood, since 2 says that the source is unusable."""

    def make_context(self, *words: Any, **more: Any) -> Any:
        """Read the words before the command's name."""
        with _usage_errors():
            return super().make_context(*words, **more)

    def invoke(self, ctx: Any) -> Any:
        """Run the command that the words name."""
        with _usage_errors():
            return super().invoke(ctx)


@contextmanager
def _usage_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # the usage errors of typer's parser
            error.exit_code = _USAGE
        raise


@contextmanager
def reported(debug: bool = False) -> Iterator[None]:
    """Turn an error into one line that names the thing and the remedy, and into the exit code of the design."""
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except KeyboardInterrupt:
        fail("stopped; nothing that was committed is lost, and the same command can be run again", 130)
    except LeukoflowError as error:
        if debug:
            traceback.print_exc()
        fail(str(error), error.exit_code)
    except Exception as error:
        if debug:
            traceback.print_exc()
        if isinstance(error, ModuleNotFoundError) and (words := how_to_install(error)):
            fail(words, 1)
        if isinstance(error, OSError) and (words := _system_trouble(error)):
            fail(words, 1)
        where = traceback.extract_tb(error.__traceback__)[-1]
        fail(
            f"{_without_values(error)} ({Path(where.filename).name}, line {where.lineno}); "
            "this is a bug in the program: --debug shows the whole traceback",
            1,
        )


def _system_trouble(error: OSError) -> str:
    """Say what an operator can mend about an error of the system, with the remedy; empty for others."""
    from leukoflow.storage.local import is_full

    scratch = os.environ.get("TMPDIR") or "/tmp"
    if is_full(str(error)) or "No usable temporary directory" in str(error):  # one more look for it would fail as well
        place = f"the disk of {error.filename}" if error.filename else f"a disk, most likely that of {scratch} (TMPDIR)"
        return f"no space left on {place}; make room there, then run the same command again"
    if isinstance(error, PermissionError) and error.filename is not None:
        return f"{error.filename}: permission denied; run the command as the user who owns the runs"
    return ""


def _without_values(error: Exception) -> str:
    """Say an unforeseen error; what a library says of values may name a patient, and is left out."""
    kind = type(error).__name__
    return kind if isinstance(error, QUOTING) or not str(error) else f"{kind}: {error}"


def fail(message: str, code: int) -> NoReturn:
    """End the command with one line on the standard error and an exit code."""
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True, soft_wrap=True).print(Text.assemble(("error: ", "bold red"), (message, "red")))
    raise typer.Exit(code)


def execute(settings: RunConfig, keep_prefect: bool, debug: bool) -> int:
    """Plan, find or start a Prefect server, run the flow under a progress display, and show the outcome."""
    from leukoflow.apps.cli.view.console import open_console
    from leukoflow.apps.cli.view.outcome import show_outcome

    console = open_console()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # until the flow takes over, stopping is just stopping
    use_configured_prefect(debug)  # a patient key may come from a block of that server
    with ExitStack() as life:  # the run's record begins before anything can fail, and ends with what has become of it
        with console.status("planning", spinner="dots"):
            from leukoflow.runs.heart import beating
            from leukoflow.tasks.intake.open_run import open_run

            def begin(root: str) -> None:
                warn_of_another(console, root)
                life.enter_context(beating(root, "planning the source"))

            opened = open_run(settings, begin)
        if note := os.environ.pop(ROOT_FILE, ""):
            Path(note).write_text(json.dumps({"root": opened.root}))
        if opened.finished is not None:
            console.print(f"[green]{opened.run_id} is finished already[/]; nothing was started.")
            show_outcome(console, opened.root, opened.finished)
            return opened.finished.exit_code
        settled = settings.model_copy(update={"run_id": opened.run_id})
        return _carry_out(console, opened, settled, keep_prefect, debug)


def warn_of_another(console: Console, root: str) -> None:
    """Say that a run is being worked on by another process, which does no harm and is of no use."""
    from leukoflow.runs.progress import ProgressReader

    reader = ProgressReader(root)
    beat = reader.heartbeat()
    if beat is not None and beat.pid != os.getpid() and reader.state(beat) == "running":
        console.print(
            f"[yellow]this run is already being worked on, by process {beat.pid} on {beat.host}[/]; both go on, and "
            "nothing is counted twice, but one is enough",
            soft_wrap=True,
        )


def _carry_out(console: Console, opened: Run, settings: RunConfig, keep_prefect: bool, debug: bool) -> int:
    """Run the flow of a run that was opened; show and return what has become of it. Raises LeukoflowError."""
    from leukoflow.apps.cli.view.live import live_progress, show_plan
    from leukoflow.apps.cli.view.outcome import show_outcome
    from leukoflow.runs.heart import beating
    from leukoflow.runs.progress import read_manifest
    from leukoflow.storage.opening import open_storage

    show_plan(console, opened.run_id, opened.root, opened.summary)
    # What the flow will import takes its seconds on one core while the server starts on the other; Prefect itself must
    # not be among it yet.
    threading.Thread(target=importlib.import_module, args=("leukoflow.tasks.inference.stages",), daemon=True).start()
    with (
        beating(opened.root, "waiting for Prefect's server") as heart,
        prefect_api(keep_prefect, debug),
        live_progress(console, opened.root),
    ):
        heart.phase("waiting for Prefect to begin the run")
        from leukoflow.flows.run import screen

        state, silent = None, None
        try:
            state = screen(settings)
        except Exception as error:
            if type(error).__module__.partition(".")[0] != "httpx" and "Failed to reach API" not in str(error):
                raise
            silent = error  # what Prefect was to learn last does not decide what became of the run
        manifest = read_manifest(open_storage(opened.root))
    if silent is not None:
        _without_prefect(console, opened.root, silent)
    elif state is not None and (manifest is None or not _well(state)):
        outcome = state.result(raise_on_failure=False)
        if isinstance(outcome, BaseException):
            raise outcome
    if manifest is None:
        words = (state.message or state.name) if state is not None else "no reason was given"
        raise LeukoflowError(f"run {opened.run_id} ended without a manifest: {words}; run the same command again")
    show_outcome(console, opened.root, manifest)
    return manifest.exit_code


def _well(state: Any) -> bool:
    """Return whether Prefect's last state is that of a run which ended as it should, or was cancelled too late."""
    return bool(state.is_completed() or state.is_cancelled() or state.is_cancelling())


def _without_prefect(console: Any, root: str, error: Exception) -> None:
    """Say the run's own last word, which Prefect's server did not take. Raises LeukoflowError unless it finished."""
    from leukoflow.apps.prefect_connection import how_to_unset_server
    from leukoflow.core.errors import RunCancelledError
    from leukoflow.runs.progress import ProgressReader

    beat = ProgressReader(root).heartbeat()
    state = beat.state if beat is not None and beat.pid == os.getpid() else "not started"
    words = beat.message if beat is not None else ""
    where = "the Prefect server does not answer, so its dashboard does not know how the run ended"
    if state == "finished":
        console.print(f"[yellow]{where}; the results are complete[/]", soft_wrap=True)
    elif state == "cancelled":
        raise RunCancelledError(words)
    elif state == "failed":
        raise LeukoflowError(f"{words} ({where})")
    else:
        raise LeukoflowError(
            f"the Prefect server does not answer ({error}); start it again, or {how_to_unset_server()} so that "
            "the run starts its own. What is committed stays, and the same command continues where the run was"
        ) from error


@contextmanager
def prefect_api(keep: bool, debug: bool) -> Iterator[None]:
    """Give the block a Prefect API: the configured one, or a local server that ends with it unless it is kept.

    To be entered from the main thread, before anything has imported Prefect, which reads its settings at import.
    """
    from leukoflow.apps import prefect_connection, prefect_server
    from leukoflow.apps.cli.view.console import open_console

    console = open_console()
    if url := use_configured_prefect(debug):
        prefect_connection.require_server(url)
        console.print(f"dashboard  {url.removesuffix('/').removesuffix('/api')}", soft_wrap=True)
        yield
        return
    with console.status("starting a Prefect server", spinner="dots"):
        server = prefect_server.start_server(keep)
    os.environ.update(prefect_server.client_environment(server))
    console.print(f"dashboard  {server.ui_url}", soft_wrap=True)
    try:
        yield
    finally:
        if "prefect" in sys.modules:  # what its log still holds back must be sent while there is somebody to take it
            from prefect.events.worker import EventsWorker
            from prefect.logging.handlers import APILogWorker

            APILogWorker.drain_all(timeout=5)
            EventsWorker.drain_all(timeout=5)
        server.stop()
        if server.keep and server.process is not None:
            console.print(
                f"the Prefect server stays at {server.ui_url}; `leukoflow prefect stop` ends it", soft_wrap=True
            )


def use_configured_prefect(debug: bool) -> str | None:
    """Point this process to the user's own Prefect API, and return its address; None when there is none."""
    from leukoflow.apps import prefect_connection, prefect_server

    if debug:
        os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "INFO")
    else:
        # Log lines that a server did not take would be complained of for each batch; that it is away is said once.
        logging.raiseExceptions = False
    url = prefect_connection.configured_api_url()
    if url is not None:
        os.environ.update(prefect_server.client_environment(None))
        os.environ["PREFECT_API_URL"] = url
    return url


def require_named(option: str, value: str) -> None:
    """Refuse an empty value, as an unset variable of a script gives: it would silently mean the current folder."""
    if not value.strip():
        raise ConfigError(f"{option} is empty: give it a value (is a variable in a script not set?)")


def root_of(out: str, run_id: str) -> str:
    """Return where a run lies. Raises what `reached` does."""
    return f"{reached(out)}/{run_id}"


@lru_cache(maxsize=4)
def reached(out: str) -> str:
    """Return `out` without a slash at its end. A store that cannot be used is reported at once, without retries."""
    from leukoflow.storage.opening import open_storage

    require_named("OUT", out)
    open_storage(out).probe()
    return out.rstrip("/")


def existing(out: str) -> str:
    """Return the same, for commands that would else make the folder. Raises ConfigError where there is none."""
    if "://" not in out and not Path(out).expanduser().is_dir():
        what = "is a file" if Path(out).expanduser().exists() else "does not exist"
        raise ConfigError(f"{out} {what}; name the folder that was given to `leukoflow run --out`")
    return reached(out)


def refuse_remote(**places: Path | None) -> None:
    """Refuse s3:// where only the local disk will do; else a folder named `s3:` would be made."""
    for name, path in places.items():
        if path is not None and str(path).startswith("s3:/"):
            raise ConfigError(
                f"{name} {path}: it must be on the local disk; copy it to or from the object store yourself"
            )
