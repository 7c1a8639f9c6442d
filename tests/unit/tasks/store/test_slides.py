"""What is remarked where one patient's runs or slides were given different labels."""

from __future__ import annotations

from leukoflow.tasks.store.slides import disagreement, patients_in_disagreement


def test_other_subtypes_are_remarked() -> None:
    assert disagreement([("smears-1", "Pro", 24), ("smears-2", "Early", 1)]) == (
        "Pro-B in smears-1 (24 fields); Early Pre-B in smears-2 (1 field). One of the answers may be wrong, or the "
        "samples may not be of one patient. Judge the slides by eye."
    )


def test_benign_beside_malignant_has_causes_of_its_own() -> None:
    said = disagreement([("a", "Benign", 9), ("b", "Pre", 9)])
    assert said.startswith(
        "Benign in a (9 fields); Pre-B in b (9 fields). Another sample or treatment can be the reason"
    )


def test_the_same_label_or_none_is_no_remark() -> None:
    assert disagreement([]) == ""
    assert disagreement([("a", "Pro", 3), ("b", None, 0), ("c", "Pro", 1)]) == ""


def test_many_are_counted() -> None:
    said = disagreement([*((f"run-{i}", "Pro", 10) for i in range(5)), ("late", "Pre", 2)])
    assert said.startswith("Pro-B in run-0, run-1, run-2 and 2 more (50 fields); Pre-B in late (2 fields).")


def test_slides_without_a_patient_are_nobodys() -> None:
    rows = [
        {"patient_id": p, "slide_id": s, "label": label, "n_predicted": 4}
        for p, s, label in ((None, "x", "Pro"), (None, "y", "Pre"), ("p_1", "a", "Pro"), ("p_1", "b", "Early"),
                            ("p_2", "c", "Pro"), ("p_2", "d", "Pro"))
    ]  # fmt: skip
    found = patients_in_disagreement(rows)
    assert list(found) == ["p_1"]
    assert found["p_1"].startswith("Pro-B in a (4 fields); Early Pre-B in b (4 fields).")
