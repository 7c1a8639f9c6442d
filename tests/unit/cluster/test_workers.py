"""What we ask Slurm and Kubernetes for, without either: job script, pods, and what is said where one is missing."""

from __future__ import annotations

import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from leukoflow.cluster.workers import (
    OPTIONS,
    elsewhere_environment,
    gpu_options,
    kubernetes_cluster,
    kubernetes_spec,
    kubernetes_worker,
    local_sizes,
    slurm_cluster,
    slurm_job,
    visible_gpus,
)
from leukoflow.core.config import ClusterSettings, KubernetesSettings, SlurmSettings, TlsSettings, load_config
from leukoflow.core.errors import ClusterError, ConfigError

SLURM = ClusterSettings(
    address="slurm",
    workers=2,
    gpu_workers=3,
    slurm=SlurmSettings(
        partition="night", account="haema", walltime="06:00:00", gpu_cores=8, gpu_memory="32GB",
        gpu_directive="--gres=gpu:a100:1", directives=("--qos=low",), prologue=("module load python",),
        python="/shared/venv/bin/python",
    ),
)  # fmt: skip
PODS = ClusterSettings(
    address="kubernetes",
    workers=2,
    gpu_workers=3,
    kubernetes=KubernetesSettings(
        image="registry.lab/leukoflow:1", name="night-{uuid}", gpu_node_selector={"pool": "gpu"},
        gpu_tolerations=("nvidia.com/gpu",), env={"AWS_ENDPOINT_URL": "http://store"}, env_secrets=("s3-keys",),
        service_account="runner", image_pull_secret="pull", gpu_cores="3500m",
    ),
)  # fmt: skip


def script(job: dict[str, Any]) -> list[str]:
    from dask_jobqueue.slurm import SLURMJob

    return SLURMJob("tcp://10.1.1.1:8786", name="w-1", config_name="slurm", **job).job_script().splitlines()


def test_the_job_script_asks_for_one_process_and_one_gpu() -> None:
    lines = script(slurm_job(SLURM, gpu=True))
    asked = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]
    assert asked == [
        "-J leukoflow-gpu", "-p night", "-A haema", "-n 1", "--cpus-per-task=8", "--mem=30G", "-t 06:00:00",
        "--gres=gpu:a100:1", "--qos=low",
    ]  # fmt: skip
    assert "export OMP_NUM_THREADS=8" in lines
    assert "export DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED=False" in lines
    assert lines.index("module load python") > lines.index("export OMP_NUM_THREADS=8")
    assert lines[-1].startswith(
        "/shared/venv/bin/python -m distributed.cli.dask_worker tcp://10.1.1.1:8786 --name w-1 "
    )
    for words in ("--nthreads 1 ", "--nanny ", "--resources GPU=1"):
        assert words in lines[-1]


def test_the_job_of_a_worker_without_a_gpu_asks_for_none() -> None:
    lines = script(slurm_job(SLURM, gpu=False))
    assert "#SBATCH --cpus-per-task=1" in lines
    assert not [line for line in lines if "gres" in line or "GPU" in line]


def test_dask_understands_the_settings_that_travel_as_environment() -> None:
    from dask.config import collect_env, get

    found = collect_env(elsewhere_environment(2))
    assert {key: get(key, config=found) for key in OPTIONS} == OPTIONS


def schema(kind: str) -> dict[str, Any]:
    """The operator's own definition of a resource; Kubernetes prunes what it does not know, here that is an error."""
    folder = files("dask_kubernetes") / "operator/deployment/helm/dask-kubernetes-operator/crds"
    definition = yaml.safe_load((folder / f"{kind}.yaml").read_text())
    found: dict[str, Any] = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return closed(found)


def closed(part: Any) -> Any:
    if isinstance(part, list):
        return [closed(p) for p in part]
    if not isinstance(part, dict):
        return part
    made = {key: closed(value) for key, value in part.items()}
    if part.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    if isinstance(part.get("properties"), dict) and not part.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made


@pytest.mark.slow
def test_the_pods_are_what_the_operator_takes() -> None:
    spec = kubernetes_spec(PODS, gpu=True)
    jsonschema.validate({"spec": spec["spec"]}, schema("daskcluster"))
    for gpu in (True, False):
        worker = {"cluster": "x", "worker": kubernetes_worker(PODS, gpu, 2)}
        jsonschema.validate({"spec": worker}, schema("daskworkergroup"))
    with pytest.raises(jsonschema.ValidationError):  # the schema would notice
        jsonschema.validate({"spec": {"cluster": "x", "worker": {"spec": {"containers": [{"gpus": 1}]}}}},
                            schema("daskworkergroup"))  # fmt: skip

    assert spec["metadata"]["name"].startswith("night-")
    assert spec["spec"]["scheduler"]["service"]["selector"]["dask.org/cluster-name"] == spec["metadata"]["name"]
    worker = spec["spec"]["worker"]
    assert worker["replicas"] == 3
    (container,) = worker["spec"]["containers"]
    assert container["command"] == ["dask-worker"]
    assert container["args"][:4] == ["--nthreads", "1", "--resources", "GPU=1"]
    assert container["resources"]["limits"] == {"cpu": "3500m", "memory": "16Gi", "nvidia.com/gpu": "1"}
    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    assert (variables["OMP_NUM_THREADS"], variables["AWS_ENDPOINT_URL"]) == ("3", "http://store")
    assert container["envFrom"] == [{"secretRef": {"name": "s3-keys"}}]
    assert worker["spec"]["nodeSelector"] == {"pool": "gpu"}
    assert worker["spec"]["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists"}]
    assert (worker["spec"]["serviceAccountName"], worker["spec"]["imagePullSecrets"]) == ("runner", [{"name": "pull"}])

    (scheduler,) = spec["spec"]["scheduler"]["spec"]["containers"]
    assert scheduler["command"] == ["dask-scheduler"]
    assert {"name": "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES", "value": "0"} in scheduler["env"]
    (helper,) = kubernetes_worker(PODS, False, 2)["spec"]["containers"]
    assert "nvidia.com/gpu" not in helper["resources"]["limits"]
    assert "GPU=1" not in helper["args"]


def test_scaled_groups_begin_small() -> None:
    scaled = PODS.model_copy(update={"min_workers": 1, "max_workers": 9})
    assert kubernetes_spec(scaled, gpu=True)["spec"]["worker"]["replicas"] == 1
    assert kubernetes_spec(PODS, gpu=False)["spec"]["worker"]["replicas"] == 2


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dask_jobqueue", None)
    monkeypatch.setitem(sys.modules, "dask_kubernetes.operator", None)
    with pytest.raises(ClusterError, match=r"pip install 'leukoflow\[slurm\]'"):
        slurm_cluster(SLURM, gpu=False, security=None)
    with pytest.raises(ClusterError, match=r"pip install 'leukoflow\[kubernetes\]'"):
        kubernetes_cluster(PODS, gpu=False)


def test_without_slurm_or_kubernetes_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ClusterError, match="sbatch is not on the PATH"):
        slurm_cluster(SLURM, gpu=False, security=None)


def test_gpus_are_those_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 5")
    assert visible_gpus() == ["2", "5"]
    assert gpu_options(1, ["2", "5"])["env"] == {"CUDA_VISIBLE_DEVICES": "5"}
    assert local_sizes(ClusterSettings(workers=3), gpu=True) == (["2", "5"], 3, 5)
    assert local_sizes(ClusterSettings(workers=3, gpu_workers=1), gpu=True) == (["2"], 3, 4)
    assert local_sizes(ClusterSettings(max_workers=6, min_workers=2), gpu=False) == ([], 2, 6)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"address": "gpu1:8786"}, "tcp://HOST:8786"),
        ({"min_workers": 3, "max_workers": 2}, "below min_workers"),
        ({"address": "tcp://a:1", "max_workers": 2}, "the person who started it"),
        ({"address": "tcp://a:1", "tls": {"ca_file": "ca.pem"}}, "write tls://"),
        ({"address": "kubernetes", "tls": {"ca_file": "ca.pem"}}, "without TLS"),
        ({"slurm": {"partitoin": "night"}}, r"cluster\.slurm\.partitoin"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(source="a.zip", out="out", cluster=settings)


def test_tls_files_for_slurm_are_given_to_the_jobs() -> None:
    from distributed.security import Security

    tls = TlsSettings(ca_file="/shared/ca.pem", cert="/shared/cert.pem", key="/shared/key.pem")
    security = Security(
        tls_ca_file=tls.ca_file, tls_worker_cert=tls.cert, tls_worker_key=tls.key, require_encryption=True
    )
    lines = script(slurm_job(SLURM, gpu=False) | {"security": security, "protocol": "tls://"})
    assert "--protocol tls:// --tls-ca-file /shared/ca.pem --tls-cert /shared/cert.pem --tls-key" in lines[-1]
