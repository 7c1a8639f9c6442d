"""The evaluation as one HTML page that needs nothing else. Every number comes from the measured result."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from leukoflow.runs.records import CLASSES, read_reason

WIDTH, HEIGHT, LEFT, BOTTOM = 460, 260, 48, 34
METRICS = {
    "accuracy": "accuracy, abstained fields included",
    "macro_f1": "macro-F1",
    "mcc": "MCC",
    "auc_ovr": "AUC, one against rest",
    "ece": "ECE",
}
PROTOCOLS = {
    "cluster": "Whole clusters of photographs held out: the figures to judge by",
    "slide": "Whole slides held out",
    "random": "Random split: neighbours of test fields are in training",
}
STYLE = """
:root{color-scheme:light dark;--ink:#1d2330;--quiet:#667085;--line:#d7dbe3;--paper:#fff;--a:#2f5fd0;--b:#c05621;
--c:#2f855a;--d:#805ad5;--e:#b7791f}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9f0;--quiet:#98a2b3;--line:#333b4a;--paper:#12161f;--a:#7ea2ff;
--b:#f6ad6b;--c:#68d391;--d:#b794f4;--e:#ecc94b}}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:1080px;margin:2rem auto;
padding:0 1.5rem}
h1{font-size:1.7rem;margin-bottom:.2rem}h2{margin-top:2.6rem;font-size:1.25rem}h3{font-size:1rem;margin:1.4rem 0 .4rem}
p,figcaption{max-width:46rem}.quiet,figcaption{color:var(--quiet)}figcaption{font-size:.9rem}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;margin:.6rem 0}
th,td{padding:.25rem .8rem;border-bottom:1px solid var(--line);text-align:right}
th:first-child,td:first-child{text-align:left}
td.words{text-align:left;color:var(--quiet)}.notice{border-left:4px solid var(--b);padding:.2rem 1rem}
.row{display:flex;flex-wrap:wrap;gap:1.5rem}figure{margin:.5rem 0}svg{max-width:100%;height:auto}
svg text{fill:var(--quiet);font:12px system-ui,sans-serif}svg .axis{stroke:var(--line)}
"""
COLOURS = ("var(--a)", "var(--b)", "var(--c)", "var(--d)", "var(--e)")


def render(result: dict[str, Any]) -> str:
    """The page, from the content of `evaluation.json`. Sections that were not measured are left out."""
    bundle, data = result["bundle"], result["data"]
    parts = [
        f"<h1>Evaluation of {escape(bundle['name'])}</h1>",
        f'<p class="quiet">bundle {escape(bundle["digest"][:16])}, data {escape(data["digest"][:16])}: '
        f"{data['fields']:,} fields, {data['slides']} slides, {data['clusters']} clusters; "
        + ", ".join(f"{escape(k)} {n:,}" for k, n in data["classes"].items())
        + "</p>",
        '<p class="notice"><strong>Research use only.</strong> No diagnosis may rest on these figures: they come from '
        "one hospital's photographs, and clusters of photographs stand in for patients, whom the publisher does not "
        "name.</p>",
        _words(result),
        *_protocols(result.get("protocols", {}), result.get("comparison", {})),
        *_ablations(result.get("ablations", []), result.get("select_k", [])),
        *_probes(result.get("probes", []), result.get("robustness", [])),
        *_explanations(result.get("explanations")),
        *_rest(result.get("segmentation"), result.get("foreign")),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width"><title>Evaluation of {escape(bundle["name"])}</title><style>{STYLE}</style>'
        f"</head><body>{''.join(parts)}</body></html>\n"
    )


def _words(result: dict[str, Any]) -> str:
    text = f"<p>{escape(result.get('recipe', {}).get('text', ''))}</p>"
    random = result.get("protocols", {}).get("random", {}).get("models", {})
    if {"leukoflow", "colour histogram"} <= set(random):
        ours, plain = (random[m]["accuracy"] for m in ("leukoflow", "colour histogram"))
        corner = random.get("corner only", {}).get("accuracy")
        text += (
            f"<p>Under a random split a logistic regression on the field's colour histogram, which knows no cell, is "
            f"right in {_share(plain)} of the fields"
            + (f", and one that sees nothing but the corner with the scale bar in {_share(corner)}" if corner else "")
            + f"; the model in {_share(ours)}. A random split measures photography as much as haematology, and a high "
            "figure there means little.</p>"
        )
    return text


def _protocols(protocols: dict[str, Any], comparison: dict[str, Any]) -> list[str]:
    out = []
    for name, title in PROTOCOLS.items():
        if name not in protocols:
            continue
        protocol = protocols[name]
        models = protocol["models"]
        head = "".join(f"<th>{escape(words)}</th>" for words in METRICS.values())
        rows = "".join(
            f"<tr><td>{escape(model)}</td>"
            + "".join(f"<td>{_interval(row, key)}</td>" for key in METRICS)
            + f"<td>{escape(row['worst_group']['group'])} {row['worst_group']['accuracy']:.3f}</td></tr>"
            for model, row in models.items()
        )
        out.append(
            f"<h2>{escape(title)}</h2><p class='quiet'>{protocol['repeats']} times {protocol['folds']} folds; 95 % "
            "intervals from drawing whole groups with replacement.</p><table><tr><th></th>"
            f"{head}<th>worst group</th></tr>{rows}</table>"
        )
        if name in comparison:
            c = comparison[name]
            out.append(
                f"<p>Against the {escape(c['against'])}, on the same {c['scores']} folds: accuracy lower by "
                f"{c['difference'] * -1:+.4f} when it replaces the model; corrected resampled t-test p = "
                f"{_p(c['p_t'])}, Wilcoxon p = {_p(c['p_wilcoxon'])}, effect size {c['effect_size']:.2f}; "
                "paired 95 % interval over groups "
                f"{-c['interval_95'][1]:+.4f} to {-c['interval_95'][0]:+.4f}.</p>"
            )
        if "leukoflow" in models and "reliability" in models["leukoflow"]:
            out.append(_detail(models["leukoflow"], protocol["repeats"], name == "cluster"))
    return out


def _detail(m: dict[str, Any], repeats: int, drawn: bool) -> str:
    head = (
        "<tr><th>class</th><th>fields</th><th>sensitivity</th><th>specificity</th><th>AUC</th><th>in its set</th></tr>"
    )
    rows = "".join(
        f"<tr><td>{escape(k)}</td><td>{r['fields']}</td><td>{r['sensitivity']:.3f}</td><td>{r['specificity']:.3f}</td>"
        f"<td>{r['auc']:.3f}</td><td>{m['coverage_per_class'].get(k, float('nan')):.3f}</td></tr>"
        for k, r in m["per_class"].items()
    )
    blast = m["malignant"]
    answered = m["accuracy_answered"]
    text = (
        f"<p>Benign against malignant: sensitivity {blast['sensitivity_at_specificity_0.95']:.3f} at specificity 0.95, "
        f"{blast['sensitivity_at_specificity_0.99']:.3f} at 0.99; specificity "
        f"{blast['specificity_at_sensitivity_0.99']:.3f} at sensitivity 0.99. Prediction sets: coverage "
        f"{m['coverage']:.3f}, mean size {m['mean_set_size']:.2f}. Abstained: {_share(m['abstention_rate'])}"
        + "".join(f", {escape(read_reason(k) or k)} {n}" for k, n in m["abstained"].items())
        + (f"; accuracy on the others {answered:.3f}." if answered is not None else ".")
        + (f" Counts are over all {repeats} repeats.</p>" if repeats > 1 else "</p>")
    )
    out = f"<table>{head}{rows}</table>{text}"
    if not drawn:
        return out
    curve = [(b["confidence"], b["accuracy"]) for b in m["reliability"]]
    low = min([0.5, *(a for p in curve for a in p)])
    out += '<div class="row">' + _figure(
        _lines(
            {"ideal": [(low, low), (1, 1)], "measured": curve}, "confidence", "share that is right", (low, 1), (low, 1)
        ),
        "Reliability: fields grouped by confidence.",
    )
    risk = [(a, b) for a, b in m["risk_coverage"]]
    top = max(0.02, *(b for _, b in risk))
    out += _figure(
        _lines({"risk": risk}, "share of fields answered", "share wrong", (0, 1), (0, top)),
        "Errors among the most confident fields.",
    )
    groups = sorted(m["per_group"].items(), key=lambda item: item[1]["accuracy"])
    out += "</div><div class='row'>" + _figure(_bars(groups), "Accuracy by group, worst first.")
    return out + _figure(_confusion(m["confusion"]), "True class by row, answer by column.") + "</div>"


def _ablations(ablations: list[dict[str, Any]], curve: list[dict[str, Any]]) -> list[str]:
    out = []
    if ablations:
        rows = "".join(
            f"<tr><td>{escape(a['name'])}</td><td>{a['mean']:.4f}</td><td>{_signed(a['difference'])}</td>"
            f"<td>{_p(a['p_t'])}</td><td>{_p(a['p_t_holm'])}</td><td>{_p(a['p_wilcoxon'])}</td>"
            f"<td>{'' if a['effect_size'] is None else format(a['effect_size'], '.2f')}</td>"
            f"<td class='words'>{escape(a['what'])}</td></tr>"
            for a in ablations
        )
        out.append(
            "<h2>What each part is worth</h2><p class='quiet'>Accuracy over the folds of the clusters, "
            f"{len(ablations[0]['scores'])} scores each. p of the corrected resampled t-test, as it is and adjusted "
            "after Holm for the number of comparisons.</p>"
            "<table><tr><th></th><th>mean</th><th>difference</th><th>p</th>"
            f"<th>p, Holm</th><th>p, Wilcoxon</th><th>effect</th><th></th></tr>{rows}</table>"
            + _figure(_dots([(a["name"], a["scores"]) for a in ablations]), "Each dot is a fold, each bar the mean.")
        )
    if curve:
        points = [(float(c["k"]), c["mean"]) for c in curve]
        low = min(y for _, y in points)
        high = max(y for _, y in points)
        pad = max(0.005, (high - low) / 4)
        out.append(
            _figure(
                _lines(
                    {"mRMR": sorted(points)}, "columns kept", "accuracy", (0, max(x for x, _ in points)),
                    (low - pad, high + pad),
                ),
                "Accuracy by number of columns that mRMR keeps.",
            )
        )  # fmt: skip
    return out


def _probes(probes: list[dict[str, Any]], robustness: list[dict[str, Any]]) -> list[str]:
    out = []
    if probes:
        rows = "".join(
            f"<tr><td>{escape(p['name'])}</td><td>{p['accuracy']:.3f}</td>"
            f"<td>{'' if p['baseline'] is None else _signed(p['accuracy'] - p['baseline'])}</td>"
            f"<td class='words'>{escape(p['what'])}</td></tr>"
            for p in probes
        )
        out.append(
            "<h2>Shortcuts</h2><p>The same fields changed on purpose, answered by models that saw neither them nor "
            f"their clusters; {probes[0]['fields']} fields.</p><table><tr><th></th><th>accuracy</th><th>difference</th>"
            f"<th></th></tr>{rows}</table>"
        )
    if robustness:
        kinds: dict[str, list[tuple[float, float]]] = {}
        for r in robustness:
            start = probes[0]["accuracy"] if probes else r["accuracy"]
            kinds.setdefault(r["kind"], [(0.0, start)]).append((float(r["severity"]), r["accuracy"]))
        low = min(y for line in kinds.values() for _, y in line)
        rows = "".join(
            f"<tr><td>{escape(r['kind'])}, {escape(r['value'])}</td><td>{r['accuracy']:.3f}</td>"
            f"<td>{_share(r['answered'])}</td></tr>"
            for r in robustness
        )
        out.append(
            "<h2>Robustness</h2><div class='row'>"
            + _figure(
                _lines(kinds, "severity", "accuracy", (0, 3), (max(0.0, low - 0.05), 1)),
                "Accuracy as damage grows; 0 is the untouched field.",
            )
            + f"<table><tr><th></th><th>accuracy</th><th>answered</th></tr>{rows}</table></div>"
        )
    return out


def _explanations(found: dict[str, Any] | None) -> list[str]:
    if not found or not found["top"]:
        return []
    lines = {
        "most attended": list(zip(map(float, found["removed"]), found["top"], strict=True)),
        "random": list(zip(map(float, found["removed"]), found["random"], strict=True)),
    }
    values = [y for line in lines.values() for _, y in line]
    return [
        "<h2>Is the attention faithful?</h2>"
        + _figure(
            _lines(
                lines, "cells removed", "probability lost", (min(found["removed"]), max(found["removed"])),
                (min(0.0, *values), max(*values, 0.01)),
            ),
            f"Mean loss of the answer's probability when cells are taken away; {found['fields']} fields.",
        )
    ]  # fmt: skip


def _rest(segmentation: dict[str, Any] | None, foreign: dict[str, Any] | None) -> list[str]:
    out = []
    if segmentation:
        rows = "".join(
            f"<tr><td>{escape(k.replace('_', ' '))}</td><td>{v:.4g}</td></tr>" for k, v in segmentation.items()
        )
        out.append(f"<h2>Segmentation</h2><p>Masks and boxes that were held out.</p><table>{rows}</table>")
    if foreign:
        kinds = ", ".join(f"{escape(read_reason(k) or k)} {n}" for k, n in foreign["outcomes"].items())
        labels = ", ".join(f"{escape(k)} {n}" for k, n in foreign["labels_of_answered"].items())
        out.append(
            f"<h2>Healthy blood from another laboratory</h2><p>{foreign['images']} images: {kinds}. Labels of the "
            f"answered: {labels}. Refused or called Benign: {_share(foreign['abstained_or_benign'])}.</p>"
        )
    return out


# --- drawing ---------------------------------------------------------------------------------------------------------


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def _lines(
    series: dict[str, Sequence[tuple[float, float]]] | dict[str, list[tuple[float, float]]],
    x_name: str,
    y_name: str,
    x_range: tuple[float, float],
    y_range: tuple[float, float],
) -> str:
    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_range[0]) / max(x_range[1] - x_range[0], 1e-9)
        up = (y - y_range[0]) / max(y_range[1] - y_range[0], 1e-9)
        return LEFT + across * (WIDTH - LEFT - 110), HEIGHT - BOTTOM - up * (HEIGHT - BOTTOM - 16)

    parts = []
    for i in range(5):
        x, y = (r[0] + i / 4 * (r[1] - r[0]) for r in (x_range, y_range))
        (px, _), (_, py) = place(x, y_range[0]), place(x_range[0], y)
        parts.append(
            f'<line class="axis" x1="{LEFT}" x2="{WIDTH - 110}" y1="{py:.1f}" y2="{py:.1f}"/>'
            f'<text x="{LEFT - 6}" y="{py + 4:.1f}" text-anchor="end">{y:.3g}</text>'
            f'<text x="{px:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{x:.3g}</text>'
        )
    parts.append(
        f'<text x="{LEFT}" y="10">{escape(y_name)}</text>'
        f'<text x="{WIDTH - 110}" y="{HEIGHT - 4}" text-anchor="end">{escape(x_name)}</text>'
    )
    for i, (name, points) in enumerate(series.items()):
        colour, dash = COLOURS[i % len(COLOURS)], ' stroke-dasharray="4 4"' if name == "ideal" else ""
        at = [place(x, y) for x, y in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
        dots = "" if dash else "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in at)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>{dots}'
            f'<rect x="{WIDTH - 100}" y="{20 + 20 * i}" width="12" height="3" fill="{colour}"/>'
            f'<text x="{WIDTH - 84}" y="{26 + 20 * i}">{escape(name)}</text>'
        )
    return _svg(WIDTH, HEIGHT, "".join(parts))


def _bars(groups: Sequence[tuple[str, dict[str, Any]]]) -> str:
    parts = []
    for i, (name, row) in enumerate(groups):
        y = 4 + 18 * i
        parts.append(
            f'<text x="4" y="{y + 11}">{escape(name)} {escape(row["label"])}, {row["fields"]}</text>'
            f'<rect x="150" y="{y}" width="{200 * row["accuracy"]:.1f}" height="13" fill="var(--a)"/>'
            f'<text x="{156 + 200 * row["accuracy"]:.1f}" y="{y + 11}">{row["accuracy"]:.3f}</text>'
        )
    return _svg(420, 10 + 18 * len(groups), "".join(parts))


def _dots(rows: Sequence[tuple[str, Sequence[float]]]) -> str:
    values = [v for _, scores in rows for v in scores]
    low, high = min(values), max(values)
    span = max(high - low, 1e-9)
    parts = []
    for i, (name, scores) in enumerate(rows):
        y = 18 + 26 * i
        mean = 170 + 440 * (sum(scores) / len(scores) - low) / span
        parts.append(f'<text x="4" y="{y + 4}">{escape(name)}</text>')
        parts += [
            f'<circle cx="{170 + 440 * (v - low) / span:.1f}" cy="{y}" r="3.5" fill="var(--a)" opacity=".45"/>'
            for v in scores
        ]
        parts.append(f'<rect x="{mean - 1.5:.1f}" y="{y - 9}" width="3" height="18" fill="var(--b)"/>')
    foot = 26 * len(rows) + 22
    ends = f'<text x="170" y="{foot}">{low:.3f}</text><text x="610" y="{foot}" text-anchor="end">{high:.3f}</text>'
    return _svg(640, foot + 8, "".join(parts) + ends)


def _confusion(table: Sequence[Sequence[int]]) -> str:
    parts = []
    for i, row in enumerate(table):
        total = max(sum(row), 1)
        parts.append(f'<text x="60" y="{50 + 44 * i}" text-anchor="end">{CLASSES[i]}</text>')
        parts.append(f'<text x="{90 + 52 * i}" y="16" text-anchor="middle">{CLASSES[i]}</text>')
        for j, count in enumerate(row):
            parts.append(
                f'<rect x="{66 + 52 * j}" y="{24 + 44 * i}" width="50" height="42" fill="var(--a)" '
                f'opacity="{0.06 + 0.7 * count / total:.3f}"/>'
                f'<text x="{91 + 52 * j}" y="{50 + 44 * i}" text-anchor="middle" style="fill:var(--ink)">{count}</text>'
            )
    return _svg(290, 210, "".join(parts))


def _svg(width: int, height: int, body: str) -> str:
    return f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img">{body}</svg>'


def _interval(row: dict[str, Any], key: str) -> str:
    low, high = row["intervals_95"][key]
    return f"{row[key]:.4f} <span class='quiet'>({low:.3f} to {high:.3f})</span>"


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.4f}"


def _p(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if value >= 0.0001 else "below 0.0001"
