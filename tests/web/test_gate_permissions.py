"""What people and programs may do, and requests that others have made up."""

from __future__ import annotations

from pathlib import Path

from gate_world import PASSWORD, World, picture, sign_in, token_in, world

from leukoflow.apps.web.settings import ProxySettings, Rates, networks

DIAGNOSES = "/api/v1/diagnoses"


# --- what they may do ------------------------------------------------------------------------------------------------


def test_role_escalation(place: World) -> None:
    for name in ("vera", "rita"):
        browser = place.browser(name)
        assert browser.get("/admin").status_code == 403
        csrf = token_in(browser.get("/").text)
        form = {"csrf": csrf, "name": name, "role": "admin", "user": name}
        for what in ("role", "add", "password", "disable", "token"):
            assert browser.post(f"/admin/{what}", data=form).status_code == 403, what
        assert browser.get("/api/v1/tokens").status_code == 403
    vera = place.browser("vera")
    headers = {"x-csrf-token": token_in(vera.get("/").text)}
    verdict = {"action": "flag"}
    for path in ("/api/v1/runs/0123456789abcdef/fields/0/verdicts", "/api/v1/runs/0123456789abcdef/slides/" + "0" * 16):
        path = path if path.endswith("verdicts") else path + "/verdicts"
        assert vera.post(path, json=verdict, headers=headers).status_code == 403
    assert vera.get("/api/v1/runs/0123456789abcdef/exports").status_code == 403
    assert [u.role for u in place.gate.accounts.book().users] == ["viewer", "reviewer", "admin"]


def test_token_scopes(place: World) -> None:
    key = "0123456789abcdef"
    calls = {
        "read": ("GET", "/api/v1/runs", None),
        "diagnose": ("GET", f"{DIAGNOSES}/{'A' * 22}", None),
        "review": ("POST", f"/api/v1/runs/{key}/fields/0/verdicts", {"action": "flag"}),
        "export": ("GET", f"/api/v1/runs/{key}/exports", None),
        "admin": ("GET", "/api/v1/tokens", None),
    }
    for scope in calls:
        program = place.program("anna", scope)
        assert program.get("/api/v1/me").json() == {"name": "anna", "role": "admin", "scopes": [scope], "via": "token"}
        for needed, (method, path, body) in calls.items():
            status = program.request(method, path, json=body).status_code
            assert (status == 403) == (needed != scope), (scope, needed, status)
            assert status not in (401, 500)


def test_tokens_that_are_worth_nothing(place: World) -> None:
    token, text = place.gate.accounts.add_token("anna", "", ("read",), 1)
    for wrong in (text + "x", text[:-1], "lkf_" + "0" * 12 + "_" + "A" * 43, "", "x" * 5000):
        answer = place.browser(authorization=f"Bearer {wrong}").get("/api/v1/runs")
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.headers["content-type"] == "application/problem+json"
    good = place.browser(authorization=f"Bearer {text}")
    assert good.get("/api/v1/runs").status_code == 200
    # A bad token is not made up for by a cookie.
    assert place.browser("vera").get("/api/v1/runs", headers={"authorization": "Bearer x"}).status_code == 401
    anna = place.program("anna", "admin")
    assert anna.delete(f"/api/v1/tokens/{token.id}").status_code == 204
    assert anna.delete(f"/api/v1/tokens/{token.id}").status_code == 404
    assert good.get("/api/v1/runs").status_code == 401


def test_results_of_single_images_belong_to_one_person(place: World) -> None:
    vera, rita = place.program("vera", "diagnose"), place.program("rita", "diagnose")
    with place:  # the application's life
        job = vera.post(DIAGNOSES, files={"file": ("a.png", picture())}).json()
        assert vera.get(f"{DIAGNOSES}/{job['id']}").status_code == 200
        assert rita.get(f"{DIAGNOSES}/{job['id']}").status_code == 404
        assert rita.delete(f"{DIAGNOSES}/{job['id']}").status_code == 404
        assert rita.get(f"{DIAGNOSES}/{job['id']}/events").status_code == 404
        assert vera.delete(f"{DIAGNOSES}/{job['id']}").status_code == 204
        assert vera.get(f"{DIAGNOSES}/{job['id']}").status_code == 404


# --- requests that others have made up -------------------------------------------------------------------------------


def test_csrf_missing_wrong_or_of_another_session(place: World) -> None:
    vera, rita = place.browser("vera"), place.browser("rita")
    own, others = token_in(vera.get("/").text), token_in(rita.get("/").text)
    assert own != others
    files = {"file": ("a.png", picture())}
    for headers in ({}, {"x-csrf-token": ""}, {"x-csrf-token": "0" * 64}, {"x-csrf-token": others}):
        assert vera.post(DIAGNOSES, files=files, headers=headers).status_code == 403
        assert vera.post("/logout", headers=headers).status_code == 403
        assert vera.post("/bench", files=files, headers=headers).status_code == 403
        assert vera.delete(f"{DIAGNOSES}/{'A' * 22}", headers=headers).status_code == 403
    for form in ({}, {"csrf": ""}, {"csrf": others}, {"csrf": "\u00e4" * 64}):
        assert vera.post("/logout", data=form).status_code == 403
        assert vera.post("/bench", data=form, files=files).status_code == 403
    assert place.engine.seen == []
    with place:
        assert vera.post(DIAGNOSES, files=files, headers={"x-csrf-token": own}).status_code == 200
        assert vera.post("/bench", data={"csrf": own}, files=files).status_code == 303
    assert vera.post("/logout", data={"csrf": own}, headers={"sec-fetch-site": "cross-site"}).status_code == 403
    assert vera.get("/").status_code == 200


def test_csrf_of_the_sign_in_itself(place: World) -> None:
    """Nobody can be signed in under another name without noticing."""
    browser = place.browser()
    form = {"name": "vera", "password": PASSWORD}
    assert browser.post("/login", data=form).status_code == 403
    foreign = token_in(place.browser().get("/login").text)
    assert browser.post("/login", data=form | {"csrf": foreign}).status_code == 403


def test_tokens_need_no_csrf_and_cookies_do_not_help_them(place: World) -> None:
    program = place.program("vera", "diagnose")
    with place:
        assert program.post(DIAGNOSES, files={"file": ("a.png", picture())}).status_code == 200


def test_host_header(tmp_path: Path) -> None:
    place = world(tmp_path, names=("smears.lab",))
    for host in ("localhost", "localhost:8400", "127.0.0.1:8400", "[::1]:8400", "smears.lab", "SMEARS.lab:443"):
        assert place.browser().get("/login", headers={"host": host}).status_code == 200, host
    for host in (
        "evil.example",
        "localhost.evil.example",
        "",
        "smears.lab.evil",
        "127.0.0.1.evil",
        "[::2]",
        "a@localhost",
    ):
        answer = place.browser().get("/login", headers={"host": host})
        assert answer.status_code == 400, host
        assert "evil" not in answer.text
    assert place.browser().get("/api/v1/health", headers={"host": "evil.example"}).status_code == 400


def test_header_spoofing_of_the_oidc_proxy(tmp_path: Path) -> None:
    roles = (("lab-readers", "viewer"), ("lab-admins", "admin"))
    proxy = ProxySettings(networks(("10.0.0.1",)), True, roles=roles)
    place = world(tmp_path, proxy=proxy)
    headers = {
        "x-forwarded-user": "olga@house",
        "x-forwarded-groups": "staff, lab-admins",
        "x-forwarded-for": "10.5.5.5",
    }
    inside = place.browser(address="10.0.0.1", **headers)
    assert inside.get("/api/v1/me").json() | {"scopes": []} == {
        "name": "olga@house", "role": "admin", "via": "proxy", "scopes": [],
    }  # fmt: skip
    for address in ("10.0.0.2", "127.0.0.1", "10.5.5.5"):
        assert place.browser(address=address, **headers).get("/api/v1/me").status_code == 401
    # A second header of that name, which a client may have sent: the last one is the proxy's.
    doubled = place.browser(address="10.0.0.1")
    pairs = [("x-forwarded-user", "root"), ("x-forwarded-user", "rolf"), ("x-forwarded-groups", "lab-readers")]
    assert doubled.get("/api/v1/me", headers=pairs).json()["name"] == "rolf"
    # Known, but in no group that may come in.
    nobody = place.browser(address="10.0.0.1", **(headers | {"x-forwarded-groups": "staff"}))
    assert nobody.get("/").status_code == 403
    assert nobody.get("/api/v1/runs").status_code == 403
    assert place.browser(address="10.0.0.1").get("/").status_code == 303
    # Passwords do not work beside it, and requests need their token all the same.
    assert inside.post("/logout").status_code == 403
    csrf = token_in(inside.get("/").text)
    form = {"csrf": csrf, "name": "anna", "password": PASSWORD}
    assert inside.post("/login", data=form).status_code == 403


def test_without_that_switch_identity_headers_say_nothing(tmp_path: Path) -> None:
    place = world(tmp_path, proxy=ProxySettings(networks(("10.0.0.1",)), roles=(("g", "admin"),)))
    headers = {"x-forwarded-user": "anna", "x-forwarded-groups": "g", "x-forwarded-for": "1.2.3.4"}
    assert place.browser(address="10.0.0.1", **headers).get("/api/v1/me").status_code == 401


def test_a_client_cannot_choose_its_address(tmp_path: Path) -> None:
    """What a client sends as X-Forwarded-For counts neither from elsewhere nor in front of the proxy's own entry."""
    rates = Rates(logins_by_address=(2, 100.0), logins_by_name=(100, 0.001))
    place = world(tmp_path, rates=rates, proxy=ProxySettings(networks(("10.0.0.1",))))
    for address, header in (("10.0.0.9", "1.1.1.{}"), ("10.0.0.1", "1.1.1.{}, 10.7.7.7")):
        statuses = [
            sign_in(
                place.browser(address=address, **{"x-forwarded-for": header.format(i)}), "vera", "a guess"
            ).status_code
            for i in range(4)
        ]
        assert statuses == [401, 401, 429, 429]
