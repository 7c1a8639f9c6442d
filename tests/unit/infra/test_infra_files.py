"""The files of infra/: each is read by the program that will read it, or by one that has its schema."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from harness import ROOT

from infra.configuration import PREFIX, WEB, find_nginx, read_env_file

INFRA = ROOT / "infra"
BIN = Path(sys.executable).parent
MANIFESTS = sorted(p for p in (INFRA / "kubernetes").glob("*.yaml") if p.name != "kustomization.yaml")
UNITS = sorted(p for p in (INFRA / "systemd").iterdir())


def run(*command: str | Path, **environment: str) -> str:
    done = subprocess.run(
        [str(c) for c in command],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def compose(*arguments: str) -> str:
    return run(
        BIN / "docker-compose", "--env-file", INFRA / "compose.env.example", "-f", INFRA / "compose.yaml",
        "--profile", "gpu", "--profile", "dev", "config", *arguments,
    )  # fmt: skip


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    """compose.yaml as docker compose understands it."""
    return dict(json.loads(compose("--format", "json"))["services"])


def documents() -> list[tuple[str, dict[str, Any]]]:
    return [(p.name, d) for p in MANIFESTS for d in yaml.safe_load_all(p.read_text())]


def pods() -> list[tuple[str, dict[str, Any]]]:
    return [(d["metadata"]["name"], d["spec"]["template"]["spec"]) for _, d in documents() if d["kind"] == "Deployment"]


# --- containers ------------------------------------------------------------------------------------------------------


def test_the_linter_finds_nothing_in_the_dockerfile() -> None:
    assert run(BIN / "hadolint", INFRA / "Dockerfile") == ""


def test_the_image_runs_as_nobody_in_particular_and_copies_only_what_is_there() -> None:
    lines = (INFRA / "Dockerfile").read_text().splitlines()
    assert [line for line in lines if line.startswith("USER")] == ["USER 10001:10001"]
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for line in lines:
        if line.startswith("COPY ") and "--from" not in line:
            for source in line.split()[1:-1]:
                assert (ROOT / source).exists(), line
                assert source in kept, f"{source} is not in .dockerignore"


def test_compose_needs_every_secret_to_be_given() -> None:
    done = subprocess.run(
        [BIN / "docker-compose", "-f", INFRA / "compose.yaml", "config", "-q"],
        env={"PATH": os.defpath}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    for name in ("POSTGRES_PASSWORD", "PREFECT_AUTH", "LEUKOFLOW_PATIENT_KEY", "AWS_SECRET_ACCESS_KEY"):
        assert f"set {name}" in done.stderr


def test_compose_publishes_the_proxy_alone_and_hardens_what_is_ours(services: dict[str, Any]) -> None:
    assert [name for name, s in services.items() if s.get("ports")] == ["reverse-proxy"]
    for name, service in services.items():
        assert "no-new-privileges:true" in service["security_opt"], name
        if service["image"].startswith("leukoflow"):
            assert service["read_only"], name
            assert service["cap_drop"] == ["ALL"], name
    waits = services["prefect-server"]["depends_on"]["migrate"]["condition"]
    assert waits == "service_completed_successfully"


def test_the_web_application_trusts_the_proxy_alone(services: dict[str, Any]) -> None:
    address = services["reverse-proxy"]["networks"]["default"]["ipv4_address"]
    command = services["web"]["command"]
    assert f"--proxy-from={address}" in command
    assert f"--root-path={WEB}" in command
    assert "--proxy-sign-in" not in command
    assert services["web"]["environment"]["LEUKOFLOW_WEB_USERS"].startswith("/var/lib/leukoflow/")
    for text in ((INFRA / "nginx/locations.conf").read_text(), (INFRA / "kubernetes/web.yaml").read_text()):
        assert WEB in text
    dropped = (INFRA / "nginx/locations.conf").read_text()
    for header in ("X-Forwarded-User", "X-Forwarded-Groups"):
        assert f'proxy_set_header {header} "";' in dropped


def test_compose_mounts_files_that_exist(services: dict[str, Any]) -> None:
    for service in services.values():
        for volume in service.get("volumes", []):
            source = Path(volume.get("source", ""))
            if volume["type"] == "bind" and INFRA in source.parents and source.name not in ("tls", "site.toml"):
                assert source.exists(), source


def test_every_command_of_the_containers_exists(services: dict[str, Any]) -> None:
    """What a container starts is installed by pyproject: prefect, dask, leukoflow; and leukoflow knows the command."""
    for name, service in services.items():
        if service["image"].startswith("leukoflow") and service["command"][0] != "sh":
            assert (BIN / service["command"][0]).exists(), name


# --- Kubernetes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda p: p.name)
def test_manifests_follow_the_api(path: Path) -> None:
    for document in yaml.safe_load_all(path.read_text()):
        kubernetes_validate.validate(document, "1.33", strict=True)


def test_every_manifest_is_in_the_kustomization() -> None:
    listed = yaml.safe_load((INFRA / "kubernetes/kustomization.yaml").read_text())["resources"]
    assert sorted(listed) == [p.name for p in MANIFESTS]


@pytest.mark.parametrize(("name", "pod"), pods(), ids=lambda v: v if isinstance(v, str) else "")
def test_pods_are_restricted(name: str, pod: dict[str, Any]) -> None:
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    for container in pod["containers"] + pod.get("initContainers", []):
        context = container["securityContext"]
        assert context["readOnlyRootFilesystem"]
        assert not context["allowPrivilegeEscalation"]
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert container["resources"]["limits"]["memory"]


def test_no_secret_is_written_down_and_everything_is_behind_a_policy() -> None:
    kinds = [d["kind"] for _, d in documents()]
    assert "Secret" not in kinds
    selected = [d["spec"]["podSelector"].get("matchLabels", {}) for _, d in documents() if d["kind"] == "NetworkPolicy"]
    assert {} in selected  # the default: nothing may talk to anything
    for _, document in documents():
        if document["kind"] == "Deployment":
            labels = document["spec"]["template"]["metadata"]["labels"]
            assert any(wanted and wanted.items() <= labels.items() for wanted in selected), document["metadata"]["name"]


def test_the_server_has_the_same_settings_everywhere() -> None:
    config = next(d for _, d in documents() if d["kind"] == "ConfigMap" and d["metadata"]["name"] == "prefect-server")
    assert config["data"] == read_env_file(INFRA / "prefect-server.env")
    assert config["data"]["PREFECT_SERVER_UI_SERVE_BASE"] == PREFIX


def test_prefect_understands_the_settings_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.settings import Settings

    for name, value in read_env_file(INFRA / "prefect-server.env").items():
        monkeypatch.setenv(name, value)
    server = Settings().server
    assert server.services.db_vacuum.enabled_vacuum_types == {"events", "flow_runs", "orphans"}
    assert server.services.db_vacuum.retention_period.days == 90
    assert server.events.retention_period.days == 14
    assert server.services.db_vacuum.event_retention_overrides["prefect.flow-run.heartbeat"].days == 3
    assert not server.database.migrate_on_start


def test_a_job_of_the_kubernetes_pool_is_a_job() -> None:
    """The base job template, filled in as Prefect fills it in with its defaults and a deployment's variables."""
    from prefect.utilities.templating import apply_values

    template = json.loads((INFRA / "kubernetes/base-job-template.json").read_text())
    variables = template["variables"]["properties"]
    values = {name: v["default"] for name, v in variables.items()} | {"env": [{"name": "A", "value": "b"}]}
    deployments = yaml.safe_load((ROOT / "deployments/prefect.yaml").read_text())["deployments"]
    jobs = [d["work_pool"]["job_variables"] for d in deployments if d["work_pool"]["name"] == "leukoflow-kubernetes"]
    assert jobs
    for given in jobs:
        assert set(given) <= set(variables)
        filled = apply_values(template["job_configuration"]["job_manifest"], values | given | {"env": values["env"]})
        filled["spec"]["template"]["spec"]["containers"][0]["args"] = ["python", "-m", "prefect.engine"]
        kubernetes_validate.validate(filled, "1.33", strict=True)


# --- a host without containers ---------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_understands_the_units(tmp_path: Path) -> None:
    """With the programs replaced by one that is there: systemd-analyze also looks whether they can be run."""
    for unit in UNITS:
        text = unit.read_text().replace("/opt/leukoflow/venv/bin/prefect", "/bin/true")
        text = text.replace("/opt/leukoflow/venv/bin/dask", "/bin/true")
        text = text.replace("/opt/leukoflow/venv/bin/leukoflow", "/bin/true")
        (tmp_path / unit.name).write_text(text.replace("/opt/leukoflow/venv/bin/python", "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *sorted(str(p) for p in tmp_path.iterdir())],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    ours = [line for line in done.stderr.splitlines() if "leukoflow" in line and "postgresql" not in line]
    assert not ours


@pytest.mark.parametrize("unit", [u for u in UNITS if u.suffix == ".service"], ids=lambda u: u.name)
def test_units_are_hardened(unit: Path) -> None:
    lines = unit.read_text().splitlines()
    for wanted in (
        "User=leukoflow",
        "NoNewPrivileges=yes",
        "ProtectSystem=strict",
        "ProtectHome=yes",
        "PrivateTmp=yes",
    ):
        assert wanted in lines
    if "Type=oneshot" not in lines:
        assert "Restart=on-failure" in lines


@pytest.mark.skipif(not find_nginx(), reason="nginx is not installed")
@pytest.mark.parametrize("name", ["leukoflow.conf", "compose.conf"])
def test_nginx_understands_its_files(name: str, tmp_path: Path) -> None:
    certificate(tmp_path)
    for file in (name, "server.conf", "locations.conf"):
        text = (INFRA / "nginx" / file).read_text()
        text = text.replace("/etc/nginx/leukoflow", str(tmp_path)).replace("/etc/leukoflow/tls", str(tmp_path))
        # names of other containers cannot be resolved here; a test needs no privileged ports
        text = text.replace("prefect-server:4200", "127.0.0.1:4200").replace("grafana:3000", "127.0.0.1:3000")
        text = text.replace("server web:8400", "server 127.0.0.1:8400")
        (tmp_path / file).write_text(text)
    whole = (
        f"pid {tmp_path}/pid; error_log stderr; events {{}}\nhttp {{ access_log off; include {tmp_path}/{name}; }}\n"
    )
    (tmp_path / "nginx.conf").write_text(whole)
    (tmp_path / "logs").mkdir()
    run(*find_nginx(), "-t", "-p", tmp_path, "-c", tmp_path / "nginx.conf")


def certificate(folder: Path) -> None:
    """A self-signed one, for nginx to read."""
    from datetime import UTC, datetime, timedelta

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    signed = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(1).not_valid_before(now).not_valid_after(now + timedelta(days=1)).sign(key, hashes.SHA256())
    )  # fmt: skip
    (folder / "server.crt").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    encoding, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    private = key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, plain)
    (folder / "server.key").write_bytes(private)


# --- Dask ------------------------------------------------------------------------------------------------------------


def test_dask_outside_of_a_run_is_configured_as_inside() -> None:
    import dask

    from leukoflow.cluster.workers import OPTIONS

    with dask.config.set({}):
        read = dask.config.collect(paths=[str(INFRA / "dask.yaml")], env={})
        assert {key: dask.config.get(key, config=read) for key in OPTIONS} == OPTIONS


def test_nothing_names_a_host_of_packages_or_a_password() -> None:
    for path in [*INFRA.rglob("*"), ROOT / "deployments/automations.yaml"]:
        if path.is_file() and path.suffix not in (".pyc", ".json"):
            text = path.read_text(encoding="utf-8")
            images = re.findall(
                r"(?:^FROM|image:)\s+([^\s/]+)/", text, re.MULTILINE
            )  # a first part with a dot is a host
            assert not [first for first in images if "." in first or ":" in first], path
            assert "index-url" not in text, path
