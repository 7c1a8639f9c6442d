"""A web application with people in it and a made-up engine, for the tests of the gate."""

from __future__ import annotations

import asyncio
import hashlib
import io
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from argon2 import PasswordHasher
from fastapi import FastAPI
from PIL import Image
from starlette.testclient import TestClient

from leukoflow.apps.web.app import create_app
from leukoflow.apps.web.engine.engine import EngineLoad
from leukoflow.apps.web.engine.frames import BundleCard
from leukoflow.apps.web.settings import Rates, WebSettings
from leukoflow.runs.records import CLASSES, Quality, Status
from leukoflow.tasks.imaging.scale import stated_scale
from leukoflow.tasks.inference.single import Examination

PASSWORD = "a smear under the lamp"
PEOPLE = {"vera": "viewer", "rita": "reviewer", "anna": "admin"}
HASHER = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)
GENEROUS = Rates(logins_by_address=(10_000, 0.001), logins_by_name=(10_000, 0.001), uploads=(100_000, 0.0001))


@dataclass
class FakeEngine:
    """Answers at once, and remembers what it was asked."""

    bundles: tuple[Any, ...] = (
        BundleCard("pocket", "ab" * 32, "Pocket", CLASSES, ("nothing was measured",), 0.1),
        BundleCard("other", "cd" * 32, "Other", CLASSES, (), 0.1),
    )
    seen: list[tuple[str, bytes]] = field(default_factory=list)
    hold: asyncio.Event | None = None
    error: Exception | None = None

    async def examine(
        self, data: bytes, *, who: str, bundle: str = "", um_per_px: float | None = None,
        on_stage: Callable[[str], None] | None = None,
    ) -> Any:  # fmt: skip
        self.seen.append((who, data))
        for stage in ("decode", "normalize", "segment", "extract", "classify"):
            if on_stage is not None:
                on_stage(stage)
            await asyncio.sleep(0)
        if self.hold is not None:
            await self.hold.wait()
        if self.error is not None:
            raise self.error
        return Examination(
            sha256=hashlib.sha256(data).hexdigest(), bundle=bundle or "pocket", bundle_digest="ab" * 32,
            status=Status.PREDICTED, reason=None, label="Early", probabilities=(0.1, 0.7, 0.1, 0.1),
            prediction_set=("Early",), ood=0.5, width_px=64, height_px=64,
            quality=Quality(10.0, 0.8, 0.0, 0.3, 0.1), remarks=(), cells=None, tiles=(), seconds=(("decode", 0.01),),
            scale=stated_scale(um_per_px),
        )  # fmt: skip

    def load(self) -> Any:
        return EngineLoad(0, 0, 1, 1, 0, 0, 0.1, 0.2, "")


@dataclass
class World:
    """An application and its parts."""

    app: FastAPI
    engine: FakeEngine
    settings: WebSettings
    clients: list[TestClient] = field(default_factory=list)
    _life: TestClient | None = None

    def __enter__(self) -> World:
        """From here on all clients talk to one event loop, as with a real server."""
        self._life = TestClient(self.app, base_url="http://localhost").__enter__()
        for client in self.clients:
            client.portal = self._life.portal
        return self

    def __exit__(self, *_: object) -> None:
        for client in self.clients:
            client.portal = None
        life, self._life = self._life, None
        assert life is not None
        life.__exit__()

    @property
    def gate(self) -> Any:
        return self.app.state.gate

    def browser(
        self, name: str | None = None, address: str = "127.0.0.1", url: str = "http://localhost", **headers: str
    ) -> TestClient:
        """A browser on some machine, signed in if named."""
        client = TestClient(
            self.app, base_url=url, client=(address, 4000), headers=headers, follow_redirects=False,
            raise_server_exceptions=False,
        )  # fmt: skip
        client.portal = None if self._life is None else self._life.portal
        self.clients.append(client)
        if name is not None:
            assert sign_in(client, name).status_code == 303
        return client

    def program(self, name: str, *scopes: str, address: str = "127.0.0.1") -> TestClient:
        """A program with an API token."""
        _, text = self.gate.accounts.add_token(name, "test", scopes, 1.0)
        return self.browser(address=address, authorization=f"Bearer {text}")

    def log(self) -> str:
        return self.settings.audit_path().read_text()


def world(folder: Path, engine: FakeEngine | None = None, people: bool = True, **settings: Any) -> World:
    """An application in a folder; its people all have the same password."""
    (folder / "out").mkdir(exist_ok=True)
    chosen = WebSettings(out=str(folder / "out"), users_file=folder / "state" / "users.json", rates=GENEROUS)
    chosen = replace(chosen, **settings)
    engine = engine or FakeEngine()
    app = create_app(chosen, engine)
    accounts = app.state.gate.accounts
    accounts._hasher = HASHER
    for name, role in (PEOPLE if people else {}).items():
        if accounts.user(name) is None:
            accounts.add(name, role, PASSWORD)
    return World(app, engine, chosen)


def token_in(page: str) -> str:
    """The CSRF token of a page."""
    found = re.search(r'name="csrf" (?:value|content)="([0-9a-f]{64})"', page)
    assert found is not None, page[:500]
    return found[1]


def sign_in(client: TestClient, name: str, password: str = PASSWORD, target: str = "/") -> Any:
    """Signs in as a browser does, by the form."""
    form = {"csrf": token_in(client.get("/login").text), "next": target, "name": name, "password": password}
    return client.post("/login", data=form)


def picture(side: int = 64, colour: tuple[int, int, int] = (200, 180, 220)) -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(sink, "PNG")
    return sink.getvalue()


def archive(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", method) as made:
        for name, data in members.items():
            made.writestr(name, data)
    return sink.getvalue()
