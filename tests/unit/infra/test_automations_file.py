"""Automations as a file: what the server has is compared by content, not by how its JSON happens to be ordered."""

from __future__ import annotations

import json
from typing import Any
from uuid import uuid4

import pytest
from harness import ROOT

FILE = ROOT / "deployments" / "automations.yaml"
pytestmark = pytest.mark.filterwarnings("ignore:'imghdr' is deprecated")  # apprise's, on Python 3.11 and 3.12


def turned(value: Any) -> Any:
    """The same with the events of all triggers in the opposite order."""
    if isinstance(value, list):
        return [turned(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    return {k: v[::-1] if k in ("after", "expect") else turned(v) for k, v in value.items()}


def test_the_order_of_events_is_no_difference_and_a_time_is() -> None:
    from prefect.automations import Automation

    from leukoflow.apps.automations import _comparable, _core, read_automations

    file = read_automations(FILE, {})
    ids = {block.name: str(uuid4()) for block in file.blocks}
    cores = [_core(FILE, table, ids) for table in file.automations]
    several = 0
    for core in cores:
        stored = turned(json.loads(Automation(id=uuid4(), **core.model_dump()).model_dump_json()))
        several += len(stored["trigger"].get("after", ())) > 1 or len(stored["trigger"].get("expect", ())) > 1
        # Lists of a set are alike or not by chance, which changes from process to process.
        assert isinstance(_comparable(core)["trigger"]["after"], set)
        assert _comparable(Automation.model_validate(stored)) == _comparable(core), core.name
        if stored["trigger"].get("within"):
            stored["trigger"]["within"] += 1
            assert _comparable(Automation.model_validate(stored)) != _comparable(core), core.name
    assert several
