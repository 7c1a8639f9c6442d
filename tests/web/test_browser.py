"""Real Chromium through what people do: first start, sign-in, bench, worklist, review, export, light and dark."""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from browser_world import HOSTILE, PASSWORD, RUN, Site, page_of, picture_shown, served, until, upload

from leukoflow.tasks.review import verdicts

pytestmark = pytest.mark.timeout(180)


def rows(page: Any) -> int:
    return int(page.locator(".list a.go").count())


def open_worklist(page: Any, site: Site, query: str = "") -> str:
    page.goto(site.url + "/")
    target = page.get_attribute(".run h2 a", "href")
    page.goto(f"{site.url}{target}{query}")
    return str(target)


def test_first_start_makes_an_administrator(browser: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with served(tmp_path, tmp_path / "out", people=False) as site:
        page = page_of(browser, site, None)
        page.goto(site.app.state.gate.setup_link())
        page.fill("[name=name]", "anna")
        page.fill("[name=password]", PASSWORD)
        page.fill("[name=again]", "something else entirely")
        page.click("main button.primary")
        assert "differ" in page.inner_text("[role=alert]")
        page.fill("[name=password]", PASSWORD)
        page.fill("[name=again]", PASSWORD)
        page.click("main button.primary")
        page.wait_for_url(f"{site.url}/")
        assert "No runs yet" in page.inner_text("main")
        page.goto(f"{site.url}/bench")
        assert "No model is loaded" in page.inner_text("main")
        page.goto(f"{site.url}/agreement")
        assert "No verdicts yet" in page.inner_text("main")
        page.click("text=Sign out")
        page.wait_for_url(f"{site.url}/login")
        page.fill("[name=name]", "anna")
        page.fill("[name=password]", "not this one, I fear")
        page.click("main button.primary")
        assert "is wrong" in page.inner_text("[role=alert]")
        page.context.close()


def test_bench_from_upload_to_export(browser: Any, site: Site, tmp_path: Path) -> None:
    page = page_of(browser, site)
    page.goto(f"{site.url}/bench")
    hostile = tmp_path / f"{HOSTILE.replace('/', '')}.jpg"
    shutil.copy(site.fields[0], hostile)
    with zipfile.ZipFile(tmp_path / "more.zip", "w") as archive:
        archive.write(site.fields[1], "one.jpg")
    assert upload(page, site.fields[2], hostile, tmp_path / "more.zip").locator(".card").count() == 3
    assert "onerror" in page.inner_text("#jobs")
    page.click(".card a.go >> nth=0")
    picture_shown(page)
    assert page.locator(".l-cells path").count() == page.locator(".cell").count() > 0
    shares = [float(t) for t in page.locator(".cell dl dd:first-of-type").all_inner_texts()]
    assert shares == sorted(shares, reverse=True)
    # Layers
    page.check("[name=base][value=normalized]")
    assert page.get_attribute("[data-layer=original]", "hidden") is not None
    assert "normalized" in page.get_attribute("[data-layer=normalized] image", "href")
    assert "normalized" in page.get_attribute(".cell image >> nth=0", "href")
    page.check("[name=over][value=nucleus]")
    assert page.get_attribute("[data-layer=nucleus]", "hidden") is None
    page.select_option("[name=map]", "Pro")
    with page.expect_response(re.compile("map-Benign")) as answer:
        page.select_option("[name=map]", "Benign")
    assert answer.value.ok
    assert answer.value.headers["content-type"] == "image/png"
    # Zoom and movement by keyboard, button and wheel
    page.focus(".canvas")
    whole = page.get_attribute(".canvas", "viewBox")
    page.keyboard.press("+")
    near = page.get_attribute(".canvas", "viewBox")
    assert near != whole
    page.keyboard.press("ArrowRight")
    assert page.get_attribute(".canvas", "viewBox") != near
    page.keyboard.press("0")
    assert page.get_attribute(".canvas", "viewBox") == whole
    page.hover(".canvas")
    page.mouse.wheel(0, -200)
    until(lambda: page.get_attribute(".canvas", "viewBox") != whole)
    page.click("[data-zoom=whole]")
    # Picture and gallery know each other
    page.hover(".cell >> nth=1")
    assert page.locator(".l-cells path.hot").count() == 1
    # Exports
    for kind, begin in (("png", b"\x89PNG"), ("pdf", b"%PDF"), ("json", b"{")):
        with page.expect_download() as download:
            page.evaluate("kind => document.querySelector(`a[href$='export.${kind}']`).click()", kind)
        path = tmp_path / f"export.{kind}"
        download.value.save_as(path)
        assert path.read_bytes().startswith(begin)
    assert "Research use only" in json.loads((tmp_path / "export.json").read_text())["notice"]
    assert page.title() != "owned"
    assert page.troubles == []
    page.context.close()


def test_everything_that_is_chosen_gets_an_answer(browser: Any, site: Site, tmp_path: Path) -> None:
    page = page_of(browser, site)
    page.goto(f"{site.url}/bench")
    (tmp_path / "hollow.jpg").write_bytes(b"")
    (tmp_path / "words.txt").write_text("no picture")
    with zipfile.ZipFile(tmp_path / "bare.zip", "w") as archive:
        archive.mkdir("nothing in it")
    given = [*site.fields[4:7], tmp_path / "hollow.jpg", tmp_path / "words.txt", tmp_path / "bare.zip", site.fields[4]]
    job = upload(page, *given)
    assert job.locator(".card").count() == 7
    assert job.locator("h3 >> nth=0").inner_text().startswith("7 images: ")
    cards = dict(zip(job.locator(".card .name").all_inner_texts(), job.locator(".card").all_inner_texts(), strict=True))
    assert "The file is empty." in cards["hollow.jpg"]
    assert "An archive without images." in cards["bare.zip"]
    assert "Quarantined" in cards["words.txt"]
    assert page.locator("#toast").inner_text() == ""
    assert page.troubles == []
    page.context.close()


def test_a_folder_and_what_cannot_be_read_get_an_answer_too(browser: Any, site: Site) -> None:
    page = page_of(browser, site)
    page.goto(f"{site.url}/bench")
    before = page.locator("#jobs > section").count()
    page.evaluate(
        """(limit) => {
          DataTransferItem.prototype.webkitGetAsEntry = function () {
            return { isDirectory: this.getAsFile().name === 'slides', name: this.getAsFile().name };
          };
          const whole = File.prototype.slice;
          File.prototype.slice = function (...range) {
            if (this.name === 'away.jpg') return { arrayBuffer: () => Promise.reject(new Error('gone')) };
            return whole.apply(this, range);
          };
          const carrier = new DataTransfer();
          for (const name of ['slides', 'away.jpg', 'hollow.jpg']) carrier.items.add(new File([], name));
          carrier.items.add(new File([new Uint8Array(limit * 1024 * 1024 + 1)], 'huge.tif'));
          const how = { dataTransfer: carrier, bubbles: true, cancelable: true };
          document.body.dispatchEvent(new DragEvent('drop', how));
        }""",
        64,
    )
    until(lambda: page.locator("#jobs > section").count() == before + 1)
    page.wait_for_selector("#jobs:not(:has([aria-busy]))", timeout=60_000)
    job = page.locator("#jobs > section >> nth=0")
    assert job.locator("h3 >> nth=0").inner_text() == "4 images: 4 quarantined"
    said = dict(zip(job.locator(".card .name").all_inner_texts(), job.locator(".card").all_inner_texts(), strict=True))
    assert "A folder: open it" in said["slides"]
    assert "could not read it" in said["away.jpg"]
    assert "has no bytes" in said["hollow.jpg"]
    assert "Larger than 64 MB." in said["huge.tif"]
    # What is refused as a whole says so.
    page.evaluate(
        """() => {
          const carrier = new DataTransfer();
          for (let i = 0; i < 65; i += 1) carrier.items.add(new File(['x'], `${i}.png`));
          const how = { dataTransfer: carrier, bubbles: true, cancelable: true };
          document.body.dispatchEvent(new DragEvent('drop', how));
        }"""
    )
    until(
        lambda: "Nothing was sent: you chose 65 files, and at most 64 can be sent at once." in page.inner_text("#toast")
    )
    assert page.troubles == []
    page.context.close()


def test_where_the_model_abstained_there_is_no_answer_to_accept(browser: Any, site: Site, tmp_path: Path) -> None:
    shutil.copytree(site.out, tmp_path / "out")
    part = tmp_path / "out" / RUN / "predictions" / "part-00000.parquet"
    rows = pq.read_table(part).to_pylist()
    given = next(r for r in rows if r["status"] == "predicted")
    given |= {"status": "abstained", "reason": "ambiguous: confidence 0.51 < 0.53", "prediction_set": ["Pre"]}
    given |= {"label": "Pre", "width_px": 2592, "height_px": 1944, "um_per_px": None, "um_per_px_source": None}
    pq.write_table(pa.Table.from_pylist(rows, pq.read_schema(part)), part, use_dictionary=False)
    with served(tmp_path, tmp_path / "out") as other:
        page = page_of(browser, other)
        run = open_worklist(page, other, "?tab=fields&status=abstained")
        line = page.locator(".list tbody tr", has_text=given["image_key"].rpartition("/")[2]).inner_text()
        assert "no answer" in line
        assert not re.search("Pre-B|Benign|Pro-B", line)
        page.goto(f"{other.url}{run}/fields/{rows.index(given)}")
        picture_shown(page)
        said = page.inner_text("section[aria-label=Prediction]")
        assert "No answer" in said
        assert "The likeliest cause is the missing scale: the picture has 2592 × 1944 px" in said
        assert not re.search("Prediction set|of 100|Pre-B", said)  # probabilities are folded away
        page.click(".leaning summary")
        assert "They are no answer" in page.inner_text(".leaning")
        bar = page.inner_text("[data-review]")
        assert "Accept" not in bar
        assert page.locator("[data-review] [aria-pressed=true]").count() == 0
        page.keyboard.press("a")
        until(lambda: "no answer to accept" in page.inner_text("[data-saved]"))
        page.keyboard.press("m")
        assert page.input_value("[name=map]") == ""
        page.focus("main")
        page.keyboard.press("3")
        page.wait_for_url(re.compile("decided="))
        page.keyboard.press("b")
        page.wait_for_selector("#standing[data-decision='correct:Pre']")
        assert "labelled it Pre-B" in page.inner_text("#standing")
        assert [str(v.action) for v in verdicts.read(str(other.out), RUN).given][-1:] == ["correct"]
        assert page.troubles == []
        page.context.close()


def test_two_bundles_side_by_side(browser: Any, site: Site) -> None:
    page = page_of(browser, site, "vera")
    page.goto(f"{site.url}/bench")
    page.select_option("[name=other]", label="other")
    assert upload(page, site.fields[3]).locator(".card").count() == 2
    page.click(".card a.go >> nth=0")
    page.wait_for_selector("#versus")
    table = page.inner_text("section:has(#versus)")
    assert "bundle" in table
    assert "other" in table
    assert "models agree" in table
    page.click("section:has(#versus) a")
    page.wait_for_selector("#versus")
    assert "other" in page.inner_text("section:has(#versus) b")
    assert page.troubles == []
    page.context.close()


def test_paste_and_drop_end_in_the_same_form(browser: Any, site: Site) -> None:
    page = page_of(browser, site)
    page.goto(f"{site.url}/bench")
    give = """async ([url, kind]) => {
      const data = await (await fetch(url)).blob();
      const carrier = new DataTransfer();
      carrier.items.add(new File([data], kind + '.webp', {type: 'image/webp'}));
      const name = {drop: 'dataTransfer', paste: 'clipboardData'}[kind];
      const event = kind === 'drop' ? new DragEvent('drop', {[name]: carrier, bubbles: true, cancelable: true})
        : new ClipboardEvent('paste', {[name]: carrier, bubbles: true, cancelable: true});
      document.body.dispatchEvent(event);
    }"""
    run = open_worklist(page, site)
    page.goto(f"{site.url}/bench")
    before = page.locator("#jobs > section").count()
    for n, kind in enumerate(("drop", "paste"), 1):
        page.evaluate(give, [f"{run}/fields/0/original.webp", kind])
        until(lambda wanted=before + n: page.locator("#jobs > section").count() == wanted)
    page.wait_for_selector("#jobs:not(:has([aria-busy]))", timeout=60_000)
    assert {"drop.webp", "paste.webp"} <= set(re.findall(r"\w+\.webp", page.inner_text("#jobs")))
    assert page.troubles == []
    page.context.close()


def test_worklist_filters_sorts_and_searches_without_names_in_addresses(browser: Any, site: Site) -> None:
    page = page_of(browser, site)
    open_worklist(page, site)
    head = page.inner_text("#recon")
    assert all(word in head for word in ("received", "predicted", "abstained", "rejected", "quarantined", "missing"))
    assert "Reconciled" in head
    assert rows(page) == 3
    assert HOSTILE in page.inner_text(".list")
    page.click(".tabs a >> nth=1")
    page.wait_for_selector(".tabs a[aria-current]:has-text('Patients')")
    assert rows(page) == 2
    patient = page.locator(".list a.go").first.inner_text()[:8]
    page.fill("[type=search]", patient)
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile("find="))
    assert rows(page) == 1
    assert patient not in page.url
    page.click(".tabs a >> nth=2")
    page.wait_for_selector(".tabs a[aria-current]:has-text('Fields')")
    assert rows(page) > 1
    page.click("text=Show all")
    until(lambda: rows(page) == 11)
    page.select_option("[name=status]", "quarantined")
    until(lambda: rows(page) == 1)
    page.select_option("[name=label]", "Pro")
    page.wait_for_selector("text=No fields match these filters")
    assert page.title() != "owned"
    assert page.troubles == []
    page.context.close()


def test_review_by_keyboard(browser: Any, site: Site) -> None:
    page = page_of(browser, site)
    open_worklist(page, site, "?tab=fields&sort=name")
    page.keyboard.press("j")
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    picture_shown(page)
    first = page.url
    for key in "13f":  # faster than the server answers
        page.keyboard.press(key)
    page.wait_for_url(re.compile("decided="))  # all three were saved, and led on
    page.keyboard.press("b")
    page.wait_for_url(first)
    page.wait_for_selector("#standing[data-decision='correct:Pre'][data-flagged=yes]")
    assert page.get_attribute("[data-means='correct:Pre']", "aria-pressed") == "true"
    picture_shown(page)
    page.keyboard.press("f")
    page.wait_for_selector("#standing[data-flagged=no]")
    page.keyboard.press("c")
    page.keyboard.type("smudged <b>cells</b>")
    page.click("[data-comment-box] button")
    page.wait_for_selector(".comment-text")
    assert page.inner_text(".comment-text") == "smudged <b>cells</b>"
    assert page.locator(".history li").count() == 5
    page.keyboard.press("o")
    page.wait_for_selector("[data-layer=original][hidden]", state="attached")
    page.keyboard.press("?")
    page.wait_for_selector("dialog[open]")
    page.keyboard.press("Escape")
    page.keyboard.press("j")
    page.wait_for_url(lambda url: url != first)
    page.keyboard.press("k")
    page.wait_for_url(first)
    page.keyboard.press("l")
    page.wait_for_url(re.compile("tab=fields"))
    kept = verdicts.read(str(site.out), "night").given
    assert [str(v.action) for v in kept][-5:] == ["correct", "correct", "flag", "unflag", "comment"]
    assert {v.who for v in kept} == {"rita"}
    page.goto(f"{site.url}/agreement")
    assert "labelled Pre-B" in page.inner_text("main")
    assert page.troubles == []
    page.context.close()


def test_a_verdict_that_is_not_kept_is_reported(browser: Any, site: Site) -> None:
    page = page_of(browser, site)
    open_worklist(page, site, "?tab=fields&status=predicted")
    page.click(".list a.go >> nth=0")
    picture_shown(page)
    before = page.get_attribute("#standing", "data-decision")
    page.context.set_offline(True)
    page.keyboard.press("4")
    page.wait_for_selector("[data-saved].bad")
    assert "Not saved" in page.inner_text("[data-saved]")
    assert page.get_attribute("#standing", "data-decision") == before
    assert page.get_attribute("[data-means='correct:Pro']", "aria-pressed") == "false"
    page.context.set_offline(False)
    page.evaluate("document.querySelector('[data-review] [name=seen]').value = 'another'")
    page.keyboard.press("4")
    until(lambda: "has changed since" in page.inner_text("[data-saved]"))
    page.context.close()


def test_viewers_give_no_verdicts_and_export_nothing(browser: Any, site: Site) -> None:
    page = page_of(browser, site, "vera")
    open_worklist(page, site, "?tab=fields")
    assert page.locator("main summary:has-text('Export')").count() == 0
    page.click(".list a.go >> nth=0")
    assert page.locator("[data-review]").count() == 0
    assert "reviewer" in page.inner_text("main")
    page.goto(f"{site.url}/admin")
    assert "You are not allowed to do this" in page.inner_text("main")
    page.context.close()


def test_patient_and_hand_over(browser: Any, site: Site, tmp_path: Path) -> None:
    page = page_of(browser, site)
    open_worklist(page, site, "?tab=patients")
    page.click(".list a.go >> nth=0")
    page.wait_for_url(re.compile("/patients/[0-9a-f]{16}$"))
    assert page.locator("svg.plot .point").count() == 1
    assert page.locator("table.list tbody tr").count() == 1
    for kind, begin in (("csv", b"run_id"), ("parquet", b"PAR1"), ("fhir", b"{")):
        with page.expect_download() as download:
            page.evaluate("kind => document.querySelector(`a[href*='export.${kind}']`).click()", kind)
        download.value.save_as(tmp_path / kind)
        assert (tmp_path / kind).read_bytes().lstrip(b"\xef\xbb\xbf").startswith(begin)
    assert page.troubles == []
    page.context.close()


def test_light_and_dark(browser: Any, site: Site) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    seen = {}
    for scheme in ("light", "dark"):
        page = page_of(browser, site, color_scheme=scheme)
        seen[scheme] = page.evaluate(paper)
        other = "dark" if scheme == "light" else "light"
        page.click(f"[data-theme-choice={other}]")
        seen[f"{scheme}, switched"] = page.evaluate(paper)
        page.goto(f"{site.url}/about")  # the choice stays, without a flash of the other colours
        assert page.get_attribute("html", "data-theme") == other
        page.context.close()
    assert seen["light"] == seen["dark, switched"] != seen["dark"] == seen["light, switched"]


def test_errors_help(browser: Any, site: Site) -> None:
    page = page_of(browser, site)
    run = open_worklist(page, site)
    for path, words in (
        ("/runs/0123456789abcdef", "deleted"),
        ("/patients/0123456789abcdef", "erased"),
        (f"{run}/fields/999999", "no field"),
        (f"{run}?status=unheard", "no status"),
        ("/bench/AAAAAAAAAAAAAAAAAAAAAA", "bench"),
    ):
        page.goto(site.url + path)
        assert words in page.inner_text("main"), path
        assert page.locator("main a").count()
    page.context.close()


def test_administration(browser: Any, site: Site) -> None:
    page = page_of(browser, site, "anna")
    page.goto(f"{site.url}/admin")
    page.click("text=Add a user")
    form = page.locator("form[action$='/admin/users']")
    form.locator("[name=name]").fill("nora")
    form.locator("[name=password]").fill(PASSWORD)
    form.locator("button").click()
    assert "nora can now sign in" in page.inner_text("[role=status] >> nth=0")
    page.click("text=Create a token")
    form = page.locator("form[action$='/admin/tokens']")
    form.locator("[name=label]").fill("night reports")
    form.locator("button").click()
    assert "lkf_" in page.inner_text("code.key")
    page.goto(f"{site.url}/admin")
    assert "lkf_" not in page.content()
    log = page.inner_text("section:has(#audit)")
    assert "admin tokens" in log
    assert "unbroken" in log
    page.context.close()


def test_a_real_field(browser: Any, site: Site, shared_data: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(shared_data / "all_fields.zip") as archive:
        name = next(n for n in archive.namelist() if n.lower().endswith((".jpg", ".png")))
        (tmp_path / "field.jpg").write_bytes(archive.read(name))
    page = page_of(browser, site)
    page.goto(f"{site.url}/bench")
    page.set_input_files("#files", str(tmp_path / "field.jpg"))
    page.click(".card:has-text('field.jpg') a.go", timeout=60_000)
    picture_shown(page)
    assert page.locator(".cell").count() > 0
    assert page.troubles == []
    page.context.close()
