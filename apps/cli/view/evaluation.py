"""What is shown of an evaluation: figures by protocol, masks, and other laboratories."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from leukoflow.apps.cli.view.console import facts_table


def show_evaluation(target: Console, found: Mapping[str, Any]) -> None:
    """Show the figures of an evaluation: each protocol beside its baselines, then masks and other laboratories."""
    for protocol, row in found["protocols"].items():
        table = Table(box=None, padding=(0, 2), header_style="dim")
        table.add_column({"cluster": "clusters held out", "slide": "slides held out"}.get(protocol, "random split"))
        for name in row["models"]:
            table.add_column(name, justify="right")
        for key, words in (
            ("accuracy", "accuracy"),
            ("macro_f1", "macro F1"),
            ("mcc", "MCC"),
            ("auc_ovr", "AUC, one against rest"),
            ("ece", "calibration error"),
        ):
            table.add_row(words, *(f"{model[key]:.4f}" for model in row["models"].values()))
        worst = (model["worst_group"] for model in row["models"].values())
        table.add_row("worst group", *(f"{w['group']} {w['accuracy']:.3f}" for w in worst))
        target.print(table)
        model = row["models"]["leukoflow"]
        target.print(
            f"  sets: coverage {model['coverage']:.3f}, size {model['mean_set_size']:.2f}; "
            f"abstained {100 * model['abstention_rate']:.1f} %\n",
            highlight=False,
        )
    facts = facts_table()
    for key, value in found.get("segmentation", {}).items():
        facts.add_row(key.replace("_", " "), f"{value:.4g}")
    if foreign := found.get("foreign"):
        facts.add_row(
            "healthy blood of another laboratory",
            f"{foreign['abstained_or_benign']:.3f} of {foreign['images']} images abstained from or called Benign",
        )
    target.print(facts)
