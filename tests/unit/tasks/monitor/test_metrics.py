"""Figures for Prometheus: what they say, that they name nobody, and that dashboard and alerts ask for what exists."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import time
import urllib.request
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from harness import ROOT, until
from made_up_nights import facts, manifest, put
from prometheus_client.parser import text_string_to_metric_families

from leukoflow.cluster.telemetry import WORKER_METRICS, stage_telemetry
from leukoflow.core.codec import dumps
from leukoflow.core.errors import ConfigError
from leukoflow.runs.layout import OutKey
from leukoflow.runs.progress import Heartbeat, now
from leukoflow.runs.records import Marker, PartRef, Shard, ShardReceipt
from leukoflow.storage.opening import open_storage
from leukoflow.tasks.monitor.drift import facts_bytes
from leukoflow.tasks.monitor.metrics import METRICS, RunsCollector, exposition, metrics_endpoint

DASK = {"dask_scheduler_workers"}


@pytest.fixture
def out(tmp_path: Path) -> str:
    place = str(tmp_path / "out")
    for day in (1, 2, 3):
        put(place, f"Ottoline-{day}", day, shift=4.0 if day == 3 else 0.0, missing=day)
    put(place, "died", 4, finished=False)
    open_storage(place).write(OutKey.BASELINE, facts_bytes(facts("Ottoline-1", 1)))
    return place


def values(text: bytes) -> dict[tuple[str, str], float]:
    """Name and value of the only label, or nothing, to number."""
    found = {}
    for family in text_string_to_metric_families(text.decode()):
        assert family.type == "gauge"
        for sample in family.samples:
            assert len(sample.labels) <= 1
            found[sample.name, next(iter(sample.labels.values()), "")] = sample.value
    return found


def test_figures_of_all_runs(out: str) -> None:
    found = values(exposition(RunsCollector(out)))
    assert {k[1]: v for k, v in found.items() if k[0] == "leukoflow_runs" and v} == {"finished": 3, "killed": 1}
    assert found["leukoflow_members", "predicted"] == 3 * 76 + 20
    assert found["leukoflow_last_run_members", "missing"] == 3
    assert found["leukoflow_last_run_share", "quarantined"] == pytest.approx(4 / 96)
    assert found["leukoflow_last_run_labels", "Benign"] == 34
    assert found["leukoflow_last_run_stage_seconds", "segment"] == 9.6
    assert found["leukoflow_last_run_images_per_second", ""] == 2.0
    assert found["leukoflow_last_run_duration_seconds", ""] == 2400
    assert found["leukoflow_last_run_balanced", ""] == 1
    assert found["leukoflow_last_success_timestamp_seconds", ""] == datetime(2026, 3, 3, 22, 40, tzinfo=UTC).timestamp()
    assert found["leukoflow_last_run_drift_level", "stain_red"] >= 0
    assert (
        found["leukoflow_last_run_drift_psi", "stain_red"] > found["leukoflow_last_run_drift_excess", "stain_red"] > 0.1
    )
    assert found["leukoflow_last_run_drift_level", "focus"] == -1
    assert ("leukoflow_running_images_per_second", "") not in found


def test_figures_of_a_run_in_progress(out: str) -> None:
    put(out, "live", 5, finished=False)
    storage = open_storage(f"{out}/live")
    storage.write("heartbeat.json", dumps(Heartbeat(1, "elsewhere", now(), "running")))
    deadline = datetime.now(UTC) + timedelta(hours=1)
    collector = RunsCollector(out, only="live", deadline=deadline)
    found = values(exposition(collector))
    assert {s: found["leukoflow_running_shards", s] for s in ("done", "failed", "open")} == {
        "done": 1, "failed": 1, "open": 1
    }  # fmt: skip
    assert found["leukoflow_running_members", "open"] == 64
    assert ("leukoflow_running_deadline_margin_seconds", "") not in found  # no pace yet
    receipt = ShardReceipt(Shard(2, 64, 32), 32, 0, 0, 0, 9, (32, 0, 0, 0), (), 1.0)
    storage.write(
        "markers/predictions/00002.json", dumps(Marker(PartRef("predictions", "00002", "a", "k", ()), receipt))
    )
    collector._at -= 60
    again = values(exposition(collector))
    assert again["leukoflow_running_members", "open"] == 32
    assert again["leukoflow_running_images_per_second", ""] > 0
    margin = again["leukoflow_running_deadline_margin_seconds", ""]
    left = 32 / again["leukoflow_running_images_per_second", ""]
    assert margin == pytest.approx((deadline - datetime.now(UTC)).total_seconds() - left, abs=30)


def test_figures_follow_what_changes(out: str) -> None:
    collector = RunsCollector(out)
    before = values(exposition(collector))
    assert values(exposition(collector)) == before  # fresh enough: not read again
    open_storage(out).write(
        "Ottoline-3/manifest.json", dumps(replace(manifest("Ottoline-3", "2026-03-03T22:00:00+00:00"), missing=9))
    )
    open_storage(out).delete("Ottoline-2")
    open_storage(out).write("broken/run.json", b"{")
    collector._at -= 60
    after = values(exposition(collector))
    assert after["leukoflow_last_run_members", "missing"] == 9
    assert after["leukoflow_runs", "finished"] == 2
    assert after["leukoflow_unreadable_runs", ""] == 1


def test_figures_name_nobody_and_stay_few(out: str) -> None:
    before = exposition(RunsCollector(out))
    for day in range(5, 25):
        put(out, f"Ottoline-{day}", day)
    text = exposition(RunsCollector(out))
    assert b"Ottoline" not in text
    assert b"/in/" not in text
    assert abs(text.count(b"\n") - before.count(b"\n")) < 5


def test_an_empty_folder_gives_no_figure_for_what_is_not_known(tmp_path: Path) -> None:
    found = values(exposition(RunsCollector(str(tmp_path))))
    assert found["leukoflow_runs", "finished"] == 0
    assert not any(name.startswith("leukoflow_last_") for name, _ in found)
    assert {m for m, _ in found} <= METRICS.keys()


def test_every_promised_metric_comes(out: str) -> None:
    families = {f.name for f in RunsCollector(out).collect()}
    assert families == METRICS.keys()


def test_figures_over_http_until_the_block_ends(out: str) -> None:
    with metrics_endpoint(RunsCollector(out), 0) as port:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
            assert b"leukoflow_last_run_share" in answer.read()
        with pytest.raises(ConfigError, match="choose another port"), metrics_endpoint(RunsCollector(out), port):
            pass
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20)


def test_workers_keep_figures_of_their_stages() -> None:
    from prometheus_client import REGISTRY

    def of(name: str) -> float:
        return REGISTRY.get_sample_value(name, {"stage": "segment"}) or 0.0

    done, failed = of("leukoflow_stage_seconds_count"), of("leukoflow_stage_failures_total")
    with stage_telemetry("run", "00000", "segment"):
        pass
    with pytest.raises(ValueError, match="no"), stage_telemetry("run", "00000", "segment"):
        raise ValueError("no")
    assert (of("leukoflow_stage_seconds_count"), of("leukoflow_stage_failures_total")) == (done + 1, failed + 1)


# --- what asks for them ----------------------------------------------------------------------------------------------

EXPORTED = METRICS.keys() | DASK | {"up", "leukoflow_stage_seconds_bucket", "leukoflow_stage_failures_total"}
NAME = re.compile(r"\b(?:leukoflow|dask)_[a-z_]+\b(?!\")|\bup\b(?=\{)")


def rules() -> list[dict[str, Any]]:
    body = yaml.safe_load((ROOT / "infra/prometheus/rules.yml").read_text())
    return [rule for group in body["groups"] for rule in group["rules"]]


def dashboard() -> dict[str, Any]:
    return dict(json.loads((ROOT / "infra/grafana/leukoflow.json").read_text()))


def test_alerts_ask_for_what_is_exported() -> None:
    assert set(WORKER_METRICS) == {"leukoflow_stage_seconds", "leukoflow_stage_failures"}
    for rule in rules():
        names = set(NAME.findall(rule["expr"]))
        assert names, rule["alert"]
        assert names <= EXPORTED, rule["alert"]
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert set(rule["annotations"]) == {"summary", "remedy"}
        for metric, selector in re.findall(r"(leukoflow_\w+)\{([^}]*)\}", rule["expr"]):
            assert set(re.findall(r"(\w+)=", selector)) <= {"job", METRICS[metric].label}, rule["alert"]


def test_alerts_agree_with_the_settings() -> None:
    from leukoflow.core.config import AlertSettings

    by_name = {rule["alert"]: rule["expr"] for rule in rules()}
    defaults = AlertSettings()
    assert by_name["LeukoflowManyQuarantined"].endswith(f"> {defaults.quarantined_share}")
    assert by_name["LeukoflowManyAbstained"].endswith(f"> {defaults.abstained_share}")


def test_the_dashboard_asks_for_what_is_exported() -> None:
    board = dashboard()
    assert board["schemaVersion"] >= 39
    assert board["title"] == "leukoflow"
    ids = [p["id"] for p in board["panels"]]
    assert len(set(ids)) == len(ids) > 12
    taken = set()
    for panel in board["panels"]:
        assert panel["datasource"] == {"type": "prometheus", "uid": "${source}"}
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells
        for target in panel["targets"]:
            names = set(NAME.findall(target["expr"]))
            assert names, panel["title"]
            assert names <= EXPORTED, panel["title"]


def test_dask_exports_what_the_dashboard_takes_from_it() -> None:
    from distributed.http.scheduler.prometheus import core

    assert {"dask_scheduler_workers"} == DASK
    assert 'self.build_name("workers")' in Path(core.__file__).read_text()


CASES = """
rule_files: [RULES]
evaluation_interval: 1m
tests:
  - interval: 1m
    input_series:
      - series: 'leukoflow_last_success_timestamp_seconds{job="leukoflow"}'
        values: '0x3000'
      - series: 'leukoflow_last_run_share{job="leukoflow", status="quarantined"}'
        values: '0.01x60 0.2x60'
      - series: 'leukoflow_last_run_drift_level{job="leukoflow", quantity="stain_red"}'
        values: '1x60 2x60'
      - series: 'leukoflow_runs{job="leukoflow", state="killed"}'
        values: '3x100 4x100'
    alert_rule_test:
      - {eval_time: 25h, alertname: LeukoflowNoNight, exp_alerts: []}
      - eval_time: 27h
        alertname: LeukoflowNoNight
        exp_alerts:
          - exp_labels: {severity: critical, job: leukoflow}
            exp_annotations:
              summary: No run has finished for more than 26 hours
              remedy: leukoflow status OUT says what the last runs are up to, and how to continue them
      - {eval_time: 30m, alertname: LeukoflowManyQuarantined, exp_alerts: []}
      - eval_time: 90m
        alertname: LeukoflowManyQuarantined
        exp_alerts:
          - exp_labels: {severity: warning, job: leukoflow, status: quarantined}
            exp_annotations:
              summary: "20% of the last run's images could not be read"
              remedy: report.html of the run has the reasons
      - {eval_time: 30m, alertname: LeukoflowDrift, exp_alerts: []}
      - eval_time: 90m
        alertname: LeukoflowDrift
        exp_alerts:
          - exp_labels: {severity: warning, job: leukoflow, quantity: stain_red}
            exp_annotations:
              summary: stain_red has drifted from the reference
              remedy: leukoflow report OUT shows since when, and at which site or scanner
      - {eval_time: 90m, alertname: LeukoflowRunDied, exp_alerts: []}
      - eval_time: 110m
        alertname: LeukoflowRunDied
        exp_alerts:
          - exp_labels: {severity: critical, job: leukoflow, state: killed}
            exp_annotations:
              summary: A run was killed
              remedy: leukoflow status OUT RUN_ID says why; the same command continues it
"""


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (apt: prometheus)")
def test_promtool_finds_rules_and_configuration_right(tmp_path: Path) -> None:
    folder = ROOT / "infra" / "prometheus"
    (tmp_path / "cases.yml").write_text(CASES.replace("RULES", str(folder / "rules.yml")))
    for arguments in (
        ["check", "config", str(folder / "prometheus.yml")],
        ["check", "rules", str(folder / "rules.yml")],
        ["test", "rules", str(tmp_path / "cases.yml")],
    ):
        done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed (apt: prometheus)")
@pytest.mark.slow
def test_a_real_prometheus_scrapes_the_figures(out: str, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with metrics_endpoint(RunsCollector(out), 0) as port:
        body = yaml.safe_load((ROOT / "infra/prometheus/prometheus.yml").read_text())
        body["rule_files"] = [str(ROOT / "infra/prometheus/rules.yml")]
        body["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        (job,) = [j for j in body["scrape_configs"] if j["job_name"] == "leukoflow"]
        assert job["static_configs"] == [{"targets": ["127.0.0.1:9109"]}]
        target = {"targets": [f"127.0.0.1:{port}"]}
        body["scrape_configs"] = [{"job_name": "leukoflow", "static_configs": [target]}]
        (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(body))
        command = [
            "prometheus", f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/tsdb",
            f"--web.listen-address={address}", "--log.level=error",
        ]  # fmt: skip
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            try:
                found = until(lambda: asked(address, "leukoflow_last_run_members"), 90, "a scrape")
                assert {r["metric"]["status"]: float(r["value"][1]) for r in found}["missing"] == 3
                alerts = until(
                    lambda: asked(address, 'ALERTS{alertname="LeukoflowImagesMissing", alertstate="firing"}'),
                    90,
                    "an alert",
                )
                assert alerts[0]["metric"]["severity"] == "warning"
            finally:
                process.terminate()


def asked(address: str, query: str) -> list[dict[str, Any]]:
    url = f"http://{address}/api/v1/query?query={urllib.request.quote(query)}&time={time.time()}"  # type: ignore[attr-defined]
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return list(json.load(answer)["data"]["result"])
    except OSError:
        return []
