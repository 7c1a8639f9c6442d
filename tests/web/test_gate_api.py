"""The JSON API against its own description, on a real run."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import schemathesis
from gate_world import World, archive, picture, world
from harness import screen_here, small_bundle, smears, white, write_zip
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from leukoflow.apps.web.api.openapi import document
from leukoflow.runs.records import CLASSES
from leukoflow.tasks.review.keys import patient_key_of, run_key_of
from leukoflow.tasks.review.runs import open_run_table
from leukoflow.tasks.review.timeline import timeline
from leukoflow.tasks.review.verdict_record import Action
from leukoflow.tasks.review.verdicts import add

API = "/api/v1"
RUN = f"{API}/runs/{run_key_of('night')}"
SEED = int(os.environ.get("LEUKOFLOW_CHAOS_SEED", "20"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of eight fields of two patients, one rejected."""
    folder = tmp_path_factory.mktemp("api")
    fields = list(smears(folder / "sample", 7, seed=5).values())
    members = {f"ward-{i % 2}/{i}.jpg": data for i, data in enumerate(fields)} | {"ward-1/blank.png": white()}
    lines = ["image_key,slide_id,patient_id,site,um_per_px"]
    lines += [f"{name},S{name[5]},{'mary' if name[5] == '0' else 'jane'},north,0.5" for name in members]
    (folder / "slides.csv").write_text("\n".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEUKOFLOW_PATIENT_KEY", "a key that only these tests have")
        screen_here(
            write_zip(folder / "night.zip", members), folder / "out", "night", small_bundle(folder / "small"),
            manifest=str(folder / "slides.csv"),
        )  # fmt: skip
    return folder / "out"


@pytest.fixture
def place(finished: Path, tmp_path: Path) -> World:
    shutil.copytree(finished, tmp_path / "out")
    return world(tmp_path, names=("testserver",))


def test_a_morning_by_program(place: World) -> None:
    program = place.program("rita", "read", "review", "export")
    runs = program.get(f"{API}/runs").json()
    assert [(r["run_id"], r["run_key"], r["members"]) for r in runs] == [("night", run_key_of("night"), 8)]
    details = program.get(RUN).json()
    assert details["reconciliation"]["balanced"] is True
    assert details["reconciliation"]["rejected"] == 1
    slides = program.get(f"{RUN}/slides").json()
    assert slides["total"] == 2
    assert [s["rank"] for s in slides["items"]] == [1, 2]
    patients = program.get(f"{RUN}/patients", params={"limit": 1}).json()
    assert (patients["total"], len(patients["items"])) == (2, 1)
    fields = program.get(f"{RUN}/fields", params={"sort": "order", "descending": "false"}).json()
    assert [f["ordinal"] for f in fields["items"]] == list(range(8))
    first = next(f for f in fields["items"] if f["status"] == "predicted")
    url = f"{RUN}/fields/{first['ordinal']}"
    whole = program.get(url).json()
    assert whole["details"]["member_sha256"]
    cells = program.get(f"{url}/cells").json()
    assert len(cells) == first["n_cells"]
    assert "image_key" not in cells[0]
    other = next(c for c in CLASSES if c != first["label"])
    kept = program.post(f"{url}/verdicts", json={"action": "correct", "label": other, "comment": "smudged"})
    assert kept.status_code == 201
    assert kept.json()["standing"]["decision"]["label"] == other
    assert kept.json()["standing"]["decision"]["who"] == "rita"
    assert program.get(url).json()["label"] == first["label"]  # the prediction stays
    slide = slides["items"][0]["slide_key"]
    flagged = program.post(f"{RUN}/slides/{slide}/verdicts", json={"action": "flag"})
    assert flagged.json()["standing"]["flagged"] is True
    found = program.post(f"{RUN}/search", json={"kind": "fields", "text": first["image_key"]}).json()
    assert found["total"] >= 1
    corrected = program.get(f"{RUN}/fields", params={"review": "corrected"}).json()
    assert [f["ordinal"] for f in corrected["items"]] == [first["ordinal"]]
    assert program.get(f"{API}/agreement").json()["n"] == 1
    late = program.post(f"{url}/verdicts", json={"action": "withdraw", "label": first["label"]})
    assert late.status_code == 422
    assert "Another decision" in late.json()["detail"]
    taken = program.post(f"{url}/verdicts", json={"action": "withdraw", "label": other})
    assert (taken.status_code, taken.json()["standing"]["decision"]) == (201, None)
    assert program.post(f"{url}/verdicts", json={"action": "withdraw"}).status_code == 422
    assert program.get(f"{RUN}/fields", params={"review": "corrected"}).json()["total"] == 0
    assert program.get(f"{API}/agreement").json()["n"] == 0
    patient = patients["items"][0]
    course = program.get(f"{API}/patients/{patient['patient_key']}/timeline").json()
    assert patient_key_of(patient["patient"]) == patient["patient_key"]
    assert len(course["points"]) == 1
    kinds = {"csv": b"\xef\xbb\xbf", "parquet": b"PAR1", "fhir": b"{"}
    for kind, start in kinds.items():
        export = program.get(f"{RUN}/exports", params={"format": kind, "patient": patient["patient_key"]})
        assert export.status_code == 200
        assert export.content.startswith(start)
        assert "attachment" in export.headers["content-disposition"]
        assert patient["patient"] not in export.headers["content-disposition"]
    log = place.log()
    for secret in (patient["patient"], first["image_key"], slides["items"][0]["name"] + '"'):
        assert secret not in log
    assert [json.loads(line)["action"] for line in log.splitlines()].count("export") == 3


def test_what_is_asked_for_wrongly(place: World) -> None:
    program = place.program("rita", "read", "review", "export")
    url = f"{RUN}/fields/0/verdicts"
    for body in (
        {}, {"action": "burn"}, {"action": "correct"}, {"action": "correct", "label": "Other"}, {"action": "comment"},
        {"action": "flag", "who": "anna"}, {"action": "comment", "comment": "x" * 3000}, [], "x", None,
        {"action": "comment", "comment": "\u0000"},
    ):  # fmt: skip
        answer = program.post(url, json=body)
        assert answer.status_code == 422, body
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["status"] == 422
    assert program.post(url, content=b"{").status_code == 422
    assert program.post(url, content=b"\xff\xfe").status_code in (400, 422)
    for params in (
        {"limit": 501},
        {"limit": 0},
        {"offset": -1},
        {"sort": "shoe size"},
        {"label": "x"},
        {"text": "mary"},
    ):
        assert program.get(f"{RUN}/fields", params=params).status_code == 422, params
    assert program.get(f"{RUN}/fields/99").status_code == 404
    assert program.get(f"{RUN}/fields", params={"slide": "0" * 16}).status_code in (200, 404)
    assert program.get(f"{RUN}/exports", params={"slide": "0" * 16}).status_code == 404
    assert program.get(f"{RUN}/exports", params={"format": "xlsx"}).status_code == 422
    assert program.get(f"{API}/patients/{'0' * 16}/timeline").status_code == 404
    assert program.delete(RUN).status_code == 405
    assert program.delete(RUN).headers["allow"] == "GET"


def test_values_that_are_wrong_are_not_repeated(place: World) -> None:
    answer = place.program("rita", "read").get(f"{RUN}/fields", params={"sort": "Jane Doe", "review": "Jane Doe"})
    assert answer.status_code == 422
    assert "Jane" not in answer.text
    assert len(answer.json()["errors"]) == 2


def test_events_of_a_finished_run(place: World) -> None:
    text = place.program("rita", "read").get(f"{RUN}/events").text
    assert text.startswith("event: done\ndata: {")


def test_several_images_and_bundles_at_once(place: World) -> None:
    program = place.program("vera", "diagnose")
    files = [("file", ("a.png", picture())), ("file", ("b.zip", archive({"x/1.png": picture(), "2.png": picture()})))]
    found = program.post(f"{API}/diagnoses", files=files, params={"bundle": ["pocket", "other"]}).json()
    assert [(i["name"], i["bundle"]) for i in found["items"]] == [
        (name, bundle) for name in ("a.png", "b.zip / x/1.png", "b.zip / 2.png") for bundle in ("pocket", "other")
    ]
    assert all(i["status"] == "predicted" and i["error"] is None for i in found["items"])
    unknown = program.post(f"{API}/diagnoses", files=files, params={"bundle": ["../../secret"]})
    assert unknown.status_code == 422
    assert "secret" not in unknown.text


def test_the_page_that_documents_it_needs_nothing_from_elsewhere(place: World) -> None:
    page = place.browser().get(f"{API}/docs")
    assert page.status_code == 200
    assert "http://" not in page.text.replace("http://localhost", "")
    assert "https://" not in page.text
    for path in document(place.app)["paths"]:
        assert path in page.text
    assert "text/html" in page.headers["content-type"]


def test_the_description_is_openapi_3_1_with_problems_for_every_error(place: World) -> None:
    found = place.browser().get(f"{API}/openapi.json").json()
    assert found["openapi"].startswith("3.1")
    for path, operations in found["paths"].items():
        for method, operation in operations.items():
            assert operation["summary"], (method, path)
            for status, response in operation["responses"].items():
                if int(status) >= 400:
                    assert list(response["content"]) == ["application/problem+json"], (method, path, status)


# --- schemathesis ----------------------------------------------------------------------------------------------------


CHECKS = [
    not_a_server_error, status_code_conformance, content_type_conformance, response_headers_conformance,
    response_schema_conformance,
]  # fmt: skip


def hammer(place: World, cases: int) -> int:
    """Sends so many made-up requests, valid and invalid ones, and returns how many were sent."""
    described = schemathesis.openapi.from_dict(document(place.app))
    described.app = place.app
    scopes = (("read", "diagnose", "review", "export"), ("admin",))
    tokens = [place.gate.accounts.add_token("anna", "test", s, 1.0)[1] for s in scopes]
    operations = [o.ok() for o in described.get_all_operations()]
    each = max(2, cases // (2 * len(operations)))
    known: dict[str, Any] = {"run_key": run_key_of("night"), "ordinal": 1}
    sent = 0
    for operation in operations:
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            known_keys = st.booleans() if mode is GenerationMode.POSITIVE else st.just(False)

            @hypothesis.seed(SEED)
            @hypothesis.settings(
                max_examples=each, deadline=None, database=None, suppress_health_check=list(HealthCheck),
                phases=[hypothesis.Phase.generate],
            )  # fmt: skip
            @given(case=operation.as_strategy(mode), real=known_keys, token=st.sampled_from([0, 0, 0, 1]))
            def ask(case: Any, real: bool, token: int) -> None:
                nonlocal sent
                if real and case.path_parameters:
                    case.path_parameters |= {k: v for k, v in known.items() if k in case.path_parameters}
                sent += 1
                headers = {"Authorization": f"Bearer {tokens[token]}"}
                response = case.call(base_url="http://testserver", headers=headers, timeout=300)
                case.validate_response(response, checks=CHECKS)

            if mode is GenerationMode.NEGATIVE and not _can_be_wrong(operation):
                continue
            ask()
    return sent


def _can_be_wrong(operation: Any) -> bool:
    raw = operation.definition.raw
    return bool(raw.get("parameters") or raw.get("requestBody"))


def test_a_few_hundred_made_up_requests(place: World) -> None:
    assert hammer(place, 200) >= 150


@pytest.mark.chaos
@pytest.mark.timeout(3600)
def test_five_thousand_made_up_requests(place: World) -> None:
    assert hammer(place, 6600) >= 5000  # some operations have no more different requests


def test_a_patients_page_says_where_runs_do_not_agree(place: World, monkeypatch: pytest.MonkeyPatch) -> None:
    out = str(place.settings.out)
    program = place.program("rita", "read")
    patient = program.get(f"{RUN}/patients").json()["items"][0]["patient_key"]
    course = timeline(out, patient)
    nothing = replace(
        course.points[0].summary, label=None, probabilities=(), mean_malignant_probability=None, interval=None
    )
    points = (course.points[0], replace(course.points[0], run_id="empty", summary=nothing))
    said = "Runs do not agree on this patient: Pro-B in a (3 fields); Early Pre-B in b (2 fields)."
    monkeypatch.setattr(
        "leukoflow.tasks.review.timeline.timeline", lambda out, key: replace(course, points=points, remarks=(said,))
    )
    page = place.browser("rita").get(f"/patients/{patient}").text
    assert said in page
    assert "2–98" not in page  # an interval from even odds is no measurement
    assert "3–98" not in page
    assert program.get(f"{API}/patients/{patient}/timeline").json()["remarks"] == [said]


def test_the_agreement_page_tells_no_kappa_of_one_decision(place: World) -> None:
    program = place.program("rita", "read", "review")
    fields = program.get(f"{RUN}/fields").json()["items"]
    answered = next(f for f in fields if f["status"] == "predicted")
    other = next(c for c in CLASSES if c != answered["label"])
    url = f"{RUN}/fields/{answered['ordinal']}/verdicts"
    assert program.post(url, json={"action": "correct", "label": other}).status_code == 201
    found = program.get(f"{API}/agreement").json()
    assert (found["n"], found["kappa"], found["kappa_interval"]) == (1, None, None)
    page = place.browser("rita").get("/agreement").text
    assert "too few decisions (1 of at least 10)" in page
    assert "kappa</dt><dd>– <small>too few" in page


def test_every_page_of_a_shadow_run_says_so(place: World) -> None:
    program, browser = place.program("rita", "read"), place.browser("rita")
    slide = program.get(f"{RUN}/slides").json()["items"][0]["slide_key"]
    base = f"/runs/{run_key_of('night')}"
    addresses = (base, f"{base}/slides/{slide}", f"{base}/fields/0")
    assert all("Shadow run" not in browser.get(address).text for address in addresses)
    folder = Path(str(place.settings.out)) / "night"
    for name in ("manifest.json", "run.json"):
        record = json.loads((folder / name).read_text()) | {"shadow_of": "other"}
        (folder / name).write_text(json.dumps(record, ensure_ascii=False, sort_keys=True, indent=1) + "\n")
    for address in addresses:
        page = browser.get(address).text
        assert "<b>Shadow run of other:</b> a candidate model was given the same images. Do not act on it." in page
    exported = browser.get(f"{base}/fields/0/export.json").json()
    assert exported["notice"].startswith("Shadow run, a trial of a candidate model: do not act on it. Research use")


def test_a_guessed_scale_is_said_on_the_slide_and_in_its_rows(place: World) -> None:
    for path in (Path(str(place.settings.out)) / "night" / "predictions").iterdir():
        unknown = {"width_px": 1999, "height_px": 1999, "um_per_px": None, "um_per_px_source": None}
        rows = [row | (unknown if row["slide_id"] == "S1" else {}) for row in pq.read_table(path).to_pylist()]
        pq.write_table(pa.Table.from_pylist(rows, pq.read_schema(path)), path, use_dictionary=False)
    program, browser = place.program("rita", "read"), place.browser("rita")
    slides = {s["name"]: s["slide_key"] for s in program.get(f"{RUN}/slides").json()["items"]}
    slide, address = slides["S1"], f"/runs/{run_key_of('night')}"
    assert "scale not given" not in browser.get(f"{address}/slides/{slides['S0']}").text
    page = browser.get(f"{address}/slides/{slide}").text
    assert "cells may have been judged at the wrong size. Do not rely on them." in page
    assert page.index("Do not rely on them.") < page.index("most probable over its answered fields")
    mark = 'title="No scale was given and this picture is not of the training size:'
    assert mark in page
    assert mark in browser.get(f"{address}?tab=fields").text
    assert mark not in browser.get(f"{address}?tab=slides").text


def test_corrections_stand_beside_what_is_reviewed(place: World) -> None:
    program, browser = place.program("rita", "read"), place.browser("rita")
    fields = program.get(f"{RUN}/fields").json()["items"]
    field = next(f for f in fields if f["status"] == "predicted")
    out, key = str(place.settings.out), field["slide_key"]
    other = next(c for c in CLASSES if c != field["label"])
    table = open_run_table(out, run_key_of("night"))
    add(out, table.verdict_on_field(field["ordinal"], Action.CORRECT, "rita", other))
    address = f"/runs/{run_key_of('night')}"
    assert "corrected: 1</span>" in browser.get(f"{address}/slides/{key}").text
    assert browser.get(address).text.count("corrected: 1</span>") == 1
