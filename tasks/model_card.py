"""The model card of a bundle: words by us, every number from `bundle.json`. `python -m tasks.model_card pocket`."""

from __future__ import annotations

import sys
from typing import Any

from models.bundle import Bundle, load_bundle

ORIGIN = """\
## What it is for

Research use only. It is no medical device, it has not been validated in a clinic, and no diagnosis may rest on it. It
sorts fields of peripheral blood smears into the four classes of one public data set (Benign = haematogones, Early
Pre-B, Pre-B, Pro-B), with a prediction set, the cells that carried the decision, and an abstention where it has no
business answering.

## Where it comes from

- Fields: the public four-class ALL set of Aria et al. (2021; Taleqani hospital, Tehran), fields of several cells each.
  Its publisher gives no patient ids; clusters were derived from colour and scale-bar type and are not patients.
- Masks: hand-drawn nuclei and cytoplasm of single white cells of two other sources (Zheng et al., Micron 2018).
- The segmenter learned from classical labels (thresholds on colour) of the fields together with those masks; the
  backbones from bags of cells and from whole fields; nothing was pretrained elsewhere.
"""

FAILURES = """\
## Known failures

- One hospital, one microscope, one stain. Scores elsewhere are not known; expect lower ones. The abstention as foreign
  is a distance in feature space and lets foreign images through (counted above).
- The held-out figure rests on few clusters, so its interval is wide. A random split of the same data would look far
  better and mean little: the colour histogram, which knows no cells, shows how much photography gives away.
- The class is that of the field's whole smear. A field with no blast in it carries the label of its smear all the same.
- Smudge cells are outlined in pieces and may count as cells.
- Calibration clusters are few as well: the prediction sets' coverage holds for fields like those, no further.
"""


def render(bundle: Bundle) -> str:
    """Markdown of the card."""
    spec, training = bundle.spec, bundle.spec.training
    metrics: dict[str, Any] = spec.metrics
    lines = [f"# Model card: {spec.name}", "", f"Bundle `{bundle.digest[:16]}`, preset {spec.preset}.", "", ORIGIN]
    lines += ["## How it was trained", ""]
    lines += [
        f"- Seed {training.seed}; minutes of network training: "
        + ", ".join(f"{name} {minutes:g}" for name, minutes in training.minutes.items()),
        f"- Training clusters: {', '.join(training.training_clusters)}",
        f"- Calibration clusters: {', '.join(training.calibration_clusters)}",
        f"- Held-out clusters (fold {training.held_out_fold}): {', '.join(training.held_out_clusters)}",
        f"- Backbones: {', '.join(f'{b.architecture} ({b.num_features} features)' for b in spec.backbones)}; "
        f"{len(spec.selected)} columns chosen by mRMR",
        *([f"- {training.notes}"] if training.notes else []),
        "",
    ]
    if not metrics:
        return "\n".join([*lines, "It has not been evaluated.", "", FAILURES])
    return "\n".join([*lines, *_measured(metrics), FAILURES])


def _measured(metrics: dict[str, Any]) -> list[str]:
    model, baseline = metrics["model"], metrics["colour_histogram"]
    intervals = model["intervals_95"]
    lines = [
        "## What was measured",
        "",
        f"{model['fields']} fields of {model['clusters']} clusters nothing was fitted on; every field is answered; "
        "abstentions are counted apart. Intervals: 95 %, whole clusters drawn with replacement.",
        "",
        "| | model | colour histogram, raw | colour histogram, normalised |",
        "|---|---|---|---|",
    ]
    names = {
        "accuracy": "accuracy",
        "macro_f1": "macro-F1",
        "mcc": "MCC",
        "auc_ovr": "AUC (one against rest)",
        "ece": "ECE",
    }
    for key, name in names.items():
        low, high = intervals[key]
        cells = [f"{model[key]:.3f} ({low:.3f} to {high:.3f})"] + [f"{baseline[b][key]:.3f}" for b in baseline]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    random_split = " | ".join(f"{baseline[b]['accuracy_random_split']:.3f}" for b in baseline)
    lines += [f"| accuracy, random split | not measured | {random_split} |", ""]
    lines += ["| class | fields | sensitivity | specificity | AUC | in prediction set |", "|---|---|---|---|---|---|"]
    for name, row in model["per_class"].items():
        numbers = " | ".join(_number(row[key]) for key in ("sensitivity", "specificity", "auc"))
        lines.append(f"| {name} | {row['fields']} | {numbers} | {_number(model['coverage_per_class'].get(name))} |")
    lines += ["", "| cluster | class | fields | accuracy | answered |", "|---|---|---|---|---|"]
    for role, table in (("", model["per_cluster"]), (" (calibration)", metrics["calibration_clusters"])):
        for name, row in table.items():
            shares = f"{row['accuracy']:.3f} | {row['answered']:.3f}"
            lines.append(f"| {name}{role} | {row['label']} | {row['fields']} | {shares} |")
    abstained = ", ".join(f"{k} {n}" for k, n in model["abstained"].items()) or "none"
    errors = ", ".join(f"{k} {n}" for k, n in metrics["errors"].items()) or "none"
    lines += [
        "",
        "Calibration clusters were seen by no network, but the thresholds were set on them; they are not in the score.",
        "",
        "- Worst held-out cluster: {cluster}, accuracy {accuracy:.3f}".format(**model["worst_cluster"]),
        f"- Errors: {errors}",
        f"- Prediction sets (wanted coverage 0.95 per class): coverage {model['coverage']:.3f}, mean size "
        f"{model['mean_set_size']:.2f}",
        f"- Abstained: {model['abstention_rate']:.3f} of the fields ({abstained}); accuracy on the others "
        f"{_number(model['accuracy_answered'])}",
    ]
    if any(baseline[b]["accuracy"] >= model["accuracy"] for b in baseline):
        lines.append(
            "- The colour histogram is at least as accurate on these clusters: this split does not show that the model "
            "knows more than photography"
        )
    for name, row in {**model["per_cluster"], **metrics["calibration_clusters"]}.items():
        if row["accuracy"] < 0.5:
            lines.append(
                f"- Cluster {name} ({row['label']}) fails as a whole: accuracy {row['accuracy']:.3f}, and still "
                f"{row['answered']:.3f} of its fields are answered. Smears unlike those it learned from can do this"
            )
    segmentation, foreign = metrics.get("segmentation"), metrics.get("foreign")
    if segmentation:
        shown = {key: f"{value:.3f}" for key, value in segmentation.items()}
        lines.append(
            f"- Segmentation, Dice: nuclei {shown['dice_nucleus_drawn']}, cells {shown['dice_cell_drawn']} on held-out "
            f"hand-drawn cells; agreement with classical labels of held-out fields: nuclei "
            f"{shown['dice_nucleus_classical']}, cells {shown['dice_cell_classical']}"
        )
    if foreign:
        outcomes = ", ".join(f"{k} {n}" for k, n in foreign["outcomes"].items())
        lines.append(
            f"- Healthy blood from another laboratory ({foreign['images']} images, should be foreign): {outcomes}"
        )
    return [*lines, ""]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    sys.stdout.write(render(load_bundle(sys.argv[1] if len(sys.argv) > 1 else "pocket")))
