"""Prefect's automations and notification blocks as a file: what the file says is what the server has."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from prefect.automations import AutomationCore
from prefect.blocks.core import Block
from prefect.blocks.webhook import Webhook
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.exceptions import ObjectNotFound
from pydantic import ValidationError

from leukoflow.core.errors import ConfigError
from leukoflow.flows.email import Email

PREFIX = "leukoflow: "
"""Automations with such a name belong to the file: one that is no longer in it is deleted from the server."""

_BLOCKS: dict[str, type[Block]] = {"webhook": Webhook, "leukoflow-email": Email}
_VARIABLE = re.compile(r"\$\{([A-Z][A-Z0-9_]*)(?::-([^}]*))?\}")


@dataclass(slots=True)
class Applied:
    """What changed on the server, by name."""

    created: list[str] = field(default_factory=list)
    updated: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)  # variables of blocks that are neither given nor on the server


@dataclass(frozen=True, slots=True)
class BlockSpec:
    """A notification block; it is written when the variable that it wants is set."""

    name: str
    type: str
    wants: str
    data: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class AutomationsFile:
    """The file, with variables filled in."""

    blocks: tuple[BlockSpec, ...]
    automations: tuple[Mapping[str, Any], ...]


def read_automations(path: Path, environment: Mapping[str, str] = os.environ) -> AutomationsFile:
    """Read the file. Raises ConfigError naming the file and what is wrong with it."""
    try:
        table = yaml.safe_load(path.read_text(encoding="utf-8"))
        blocks = tuple(BlockSpec(b["name"], b["type"], b["wants"], b["data"]) for b in table.get("blocks", []))
        automations = tuple(_filled(a, environment) for a in table["automations"])
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; name the file with the automations") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: `automations` and `blocks` are lists of tables; {error!r}") from None
    for block in blocks:
        if block.type not in _BLOCKS:
            raise ConfigError(f"{path}: block {block.name} has the type {block.type}; there are {', '.join(_BLOCKS)}")
    names = {block.name for block in blocks}
    for automation in automations:
        if not str(automation.get("name", "")).startswith(PREFIX):
            raise ConfigError(f"{path}: an automation's name begins with {PREFIX!r}, unlike {automation.get('name')!r}")
        for action in automation.get("actions", []):
            if "block" in action and action["block"] not in names:
                raise ConfigError(f"{path}: {automation['name']} names the block {action['block']}, which is not there")
    filled = (
        BlockSpec(b.name, b.type, b.wants, _filled(b.data, environment) if environment.get(b.wants) else b.data)
        for b in blocks
    )
    return AutomationsFile(tuple(filled), automations)


def apply_automations(path: Path, environment: Mapping[str, str] = os.environ) -> Applied:
    """Make the server of PREFECT_API_URL have what the file says; a second time it changes nothing.

    An automation that somebody has paused in the dashboard stays paused. A block whose variable is not set is left as
    the server has it; if it is not there either, nobody is informed through it.
    """
    wanted = read_automations(path, environment)
    applied = Applied()
    with get_client(sync_client=True) as client:
        ids: dict[str, str] = {}
        for block in wanted.blocks:
            if environment.get(block.wants):
                _save(block)
            found = _block_id(client, block)
            if found is None:
                applied.silent.append(block.wants)
            else:
                ids[block.name] = found
        existing: dict[str, list[Any]] = {}
        for automation in client.read_automations():
            if automation.name.startswith(PREFIX):
                existing.setdefault(automation.name, []).append(automation)
        for table in wanted.automations:
            core = _core(path, table, ids)
            mine = existing.pop(core.name, [])
            for double in mine[1:]:
                client.delete_automation(double.id)
            if not mine:
                client.create_automation(core)
                applied.created.append(core.name)
                continue
            core.enabled = mine[0].enabled
            if _comparable(core) == _comparable(mine[0]):
                applied.unchanged.append(core.name)
            else:
                client.update_automation(mine[0].id, core)
                applied.updated.append(core.name)
        for name, gone in existing.items():
            for automation in gone:
                client.delete_automation(automation.id)
            applied.deleted.append(name)
    return applied


def _save(block: BlockSpec) -> None:
    try:
        document = _BLOCKS[block.type](**block.data)
    except (ValidationError, TypeError):  # the message would quote the value, which is a secret
        raise ConfigError(f"{block.wants} is not a usable address for a {block.type} block") from None
    document.save(block.name, overwrite=True)


def _block_id(client: SyncPrefectClient, block: BlockSpec) -> str | None:
    try:
        return str(client.read_block_document_by_name(block.name, block.type, include_secrets=False).id)
    except ObjectNotFound:
        return None


def _core(path: Path, table: Mapping[str, Any], ids: Mapping[str, str]) -> AutomationCore:
    """Return the automation as Prefect's client has it; actions through a block that is not there are left out."""
    actions = []
    for action in table.get("actions", []):
        if "block" not in action:
            actions.append(action)
        elif action["block"] in ids:
            rest = {k: v for k, v in action.items() if k != "block"}
            actions.append(rest | {"block_document_id": ids[action["block"]]})
    try:
        return AutomationCore.model_validate({**table, "actions": actions or [{"type": "do-nothing"}]})
    except ValidationError as error:
        raise ConfigError(f"{path}: {table['name']} is not an automation as Prefect has them: {error}") from None


def _comparable(automation: AutomationCore) -> dict[str, Any]:
    # As Python objects: in JSON the events of a trigger, which are a set, would be lists in any order.
    return automation.model_dump(include=set(AutomationCore.model_fields))


def _filled(value: Any, environment: Mapping[str, str]) -> Any:
    """Fill in the ${VARIABLES} of `value`, all the way down. A whole value that is a number becomes one."""
    if isinstance(value, dict):
        return {key: _filled(inner, environment) for key, inner in value.items()}
    if isinstance(value, list):
        return [_filled(inner, environment) for inner in value]
    if not isinstance(value, str):
        return value

    def one(match: re.Match[str]) -> str:
        name, default = match.group(1), match.group(2)
        found = environment.get(name) or default
        if found is None:
            raise ConfigError(f"the variable {name} is not set; set it and apply the automations again")
        return found

    filled = _VARIABLE.sub(one, value)
    return float(filled) if filled != value and filled.replace(".", "", 1).isdigit() else filled
