"""The wheel in an environment of its own, in a folder where a user has modules named as ours are in the repository."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import sysconfig
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import ROOT, smears, until, write_zip

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
NIGHTLY = "leukoflow night/nightly"
USERS_OWN = 'raise ImportError("this is the user\'s own module")\n'


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `env/`, where only the wheel is installed beside our dependencies, and a user's own modules."""
    folder = tmp_path_factory.mktemp("user")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder / "dist")], cwd=ROOT, check=True,
        capture_output=True,
    )  # fmt: skip
    (wheel,) = (folder / "dist").glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "env")], check=True)
    python = folder / "env" / "bin" / "python"
    subprocess.run([uv(), "pip", "install", "-q", "--offline", "--no-deps", "--python", python, wheel], check=True)
    (library,) = (folder / "env" / "lib").glob("python*/site-packages")
    # Our dependencies, without the link to this checkout, which is a .pth file that is not read from here.
    (library / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    for own in ("models.py", "tasks.py", "flows/__init__.py", "apps/__init__.py"):
        (folder / own).parent.mkdir(exist_ok=True)
        (folder / own).write_text(USERS_OWN)
    fields = smears(folder / "sample", 16, seed=4)
    (folder / "field.png").write_bytes(next(iter(fields.values())))
    write_zip(folder / "smears.zip", fields)
    return folder


def uv() -> str:
    return str(Path(sys.executable).with_name("uv"))


def environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return kept | {"NO_COLOR": "1", "COLUMNS": "300", "PYTHONUNBUFFERED": "1"} | more


def call(place: Path, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(place / "env" / "bin" / "python"), *words], cwd=place, env=environment(**more), capture_output=True,
        text=True, check=False, timeout=300,
    )  # fmt: skip


def test_one_top_level_name_is_installed(place: Path) -> None:
    shown = subprocess.run(
        [uv(), "pip", "show", "-f", "--python", place / "env" / "bin" / "python", "leukoflow"], check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    files = [line.strip() for line in shown.stdout.partition("Files:")[2].splitlines() if line.strip()]
    names = {file.split("/")[0] for file in files if not file.startswith("..")}
    assert {name for name in names if not name.endswith(".dist-info")} == {"leukoflow"}
    assert "leukoflow/tasks/imaging/normalize.py" in files
    assert "leukoflow/py.typed" in files


def test_a_program_diagnoses_an_image(place: Path) -> None:
    done = call(place, "-c", "import leukoflow; print(leukoflow.__file__); print(leukoflow.diagnose('field.png'))")
    assert done.returncode == 0, done.stderr
    where, said = done.stdout.splitlines()
    assert str(place / "env") in where
    assert said.startswith("<Diagnosis: ")


def test_reading_a_run_imports_neither_torch_nor_prefect(place: Path) -> None:
    words = "import sys, leukoflow; leukoflow.open_run; print({'torch', 'prefect', 'distributed'} & set(sys.modules))"
    done = call(place, "-c", words)
    assert done.stdout.strip() == "set()", done.stderr


def test_a_run_with_two_workers_and_its_pages(place: Path, tmp_path: Path) -> None:
    done = call(
        place, "-m", "leukoflow", "run", "smears.zip", "--out", "out", "--run-id", "one", "--workers", "2",
        "--shard-size", "16", LEUKOFLOW_PREFECT_HOME=str(tmp_path / "prefect"),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert (place / "out" / "one" / "manifest.json").is_file()
    again = call(
        place, "-c",
        "import leukoflow; run = leukoflow.open_run('out/one');"
        "key = run.predictions.to_table()['image_key'][0].as_py();"
        "print(run.predictions.count_rows(), run.mask(key).semantic.shape[0], run.image(key).dtype, run.show(key))",
    )  # fmt: skip
    assert re.match(r"16 1 uint8 <Field '", again.stdout), again.stderr
    log = tmp_path / "serve.log"
    with log.open("wb") as sink:
        server = subprocess.Popen(
            [str(place / "env/bin/leukoflow"), "serve", "out", "--port", "0", "--users", str(tmp_path / "u.json")],
            cwd=place, env=environment(), stdout=sink, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        found = until(lambda: re.search(r"http://127\.0\.0\.1:(\d+)/setup", log.read_text()), 120, "the page's address")
        with urllib.request.urlopen(f"http://127.0.0.1:{found[1]}/api/v1/health", timeout=30) as answer:
            assert answer.status == 200
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)


@pytest.fixture
def worker(server: str, place: Path, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process worker of the installed wheel."""
    assert call(place, "-m", "prefect", "--no-prompt", "work-pool", "create", "--type", "process", "leukoflow")
    with (tmp_path / "worker.log").open("wb") as log:
        process = subprocess.Popen(
            [str(place / "env" / "bin" / "python"), "-m", "prefect", "worker", "start", "--pool", "leukoflow"],
            cwd=place, env=environment(PREFECT_WORKER_QUERY_SECONDS="1", LEUKOFLOW_SITE=str(place / "site.toml")),
            stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    yield process
    # The server is shared with other tests: what is scheduled for tonight must not stand among their runs.
    call(place, "-m", "prefect", "--no-prompt", "deployment", "delete", NIGHTLY)
    call(place, "-m", "prefect", "--no-prompt", "work-pool", "delete", "leukoflow")
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def test_a_deployment_is_started_by_a_worker(
    server: str, worker: subprocess.Popen[bytes], place: Path, tmp_path: Path
) -> None:
    (place / "inbox" / "slide-1").mkdir(parents=True)
    (place / "inbox" / "slide-1" / "field.png").write_bytes((place / "field.png").read_bytes())
    (place / "site.toml").write_text(
        'name = "ward"\ninbox = "inbox"\nout = "nights"\n[arrival]\nsettle_seconds = 0\n'
        "[run]\nshard_size = 16\n[run.cluster]\nworkers = 1\n"
    )
    time.sleep(1)
    file = ROOT / "deployments" / "prefect.yaml"
    done = call(place, "-m", "prefect", "--no-prompt", "deploy", "--prefect-file", str(file), "-n", "nightly")
    assert done.returncode == 0, done.stdout + done.stderr
    done = call(place, "-m", "prefect", "deployment", "run", NIGHTLY, "--watch")
    assert done.returncode == 0, done.stdout + (tmp_path / "worker.log").read_text()[-3000:]
    assert list((place / "nights").glob("*/manifest.json"))
