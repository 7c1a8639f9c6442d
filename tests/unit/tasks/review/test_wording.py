"""What people read about a prediction: sets that exclude nothing, no answers, and the missing scale."""

from __future__ import annotations

import pytest

from leukoflow.core.geometry import scale_is_guessed
from leukoflow.core.method import SegmentSettings
from leukoflow.runs.records import CLASSES
from leukoflow.tasks.review.wording import (
    MEAN_MALIGNANT_NOTE,
    SCALE_CAUTION,
    Scale,
    answered_scale_note,
    confidence_words,
    mean_words,
    over_repeats,
    reason_words,
    repeated_words,
    scale_note,
    scale_words,
    set_words,
)

SMALL = SegmentSettings(field_px=224)
MISSING = "The likeliest cause is the missing scale"


def test_a_set_of_one_excludes_nothing() -> None:
    words = set_words(["Pre"])
    assert words == (
        "Prediction set: Pre-B. This excludes no other class: by design, up to 1 field in 20 has a true class "
        "that is not in its set."
    )


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_no_set_says_that_a_class_is_excluded_or_impossible(n: int) -> None:
    words = set_words(CLASSES[:n])
    assert words.startswith("Prediction set: ")
    for wrong in ("Only", "remain", "possible", "are excluded", "is excluded"):
        assert wrong not in words
    assert ("1 field in 20" in words) == (n < 4)


def test_counts_over_repeats_are_said_as_such() -> None:
    assert over_repeats({"repeats": 4}, {"ambiguous": 106}) == " (counted over all 4 repeats)"
    assert over_repeats({"repeats": 1}, {"ambiguous": 106}) == over_repeats({"repeats": 4}, {}) == ""


def test_sets_of_several_classes() -> None:
    assert set_words(["Early", "Pre"]).startswith(
        "Prediction set: Early Pre-B or Pre-B, which the model cannot tell apart. "
    )
    assert set_words(CLASSES) == "Prediction set: all four classes. The model cannot tell them apart here."


def test_the_bundles_own_miss_rate_is_said() -> None:
    assert "up to 1 field in 10 has" in set_words(["Pro"], 0.1)
    assert "up to 15 of 100 fields have a true class that is not in their set" in set_words(["Pro"], 0.15)


def test_without_an_answer_there_is_no_set() -> None:
    assert set_words(()) == ""


@pytest.mark.parametrize(
    ("width", "height", "um_per_px", "guessed"),
    [
        (224, 224, None, False),  # as the training fields
        (240, 224, None, False),
        (360, 363, None, True),
        (2592, 1944, None, True),
        (100, 90, None, True),
        (2592, 1944, 0.19, False),
        (2592, 1944, 0.0, True),
    ],
)
def test_when_the_scale_is_a_guess(width: int, height: int, um_per_px: float | None, guessed: bool) -> None:
    assert scale_is_guessed(width, height, um_per_px, SMALL) is guessed
    assert Scale(width, height, um_per_px, SMALL).guessed is guessed


def test_without_a_size_nothing_is_known_of_the_scale() -> None:
    assert not Scale(None, None, None, SMALL).guessed


@pytest.mark.parametrize("reason", ["out of distribution: 3.1 > 2.3", "foreign: 3.1 > 2.3", "ambiguous: 0.4 < 0.5",
                                    "too few cells: 0 < 1"])  # fmt: skip
def test_an_abstention_names_the_missing_scale_first(reason: str) -> None:
    what, remedy, measured = reason_words(reason, Scale(2592, 1944, None, SMALL))
    assert what.endswith(".")
    assert remedy.startswith(MISSING)
    assert "2592 × 1944 px" in remedy
    assert "224 × 224" in remedy
    assert "--um-per-px" in remedy
    assert "um_per_px of the manifest" in remedy
    assert remedy.index("scale") < remedy.index("stain, scanner or tissue")
    assert measured == reason.partition(": ")[2]
    on_the_bench = reason_words(reason, Scale(2592, 1944, None, SMALL), "bench")[1]
    assert "Enter the scale" in on_the_bench
    assert "--um-per-px" not in on_the_bench


@pytest.mark.parametrize("scale", [None, Scale(224, 224, None, SMALL), Scale(2592, 1944, 0.19, SMALL)])
def test_with_a_scale_stain_scanner_and_tissue_come_first(scale: Scale | None) -> None:
    for reason in ("out of distribution: 3.1 > 2.3", "foreign: 3.1 > 2.3"):
        what, remedy, _ = reason_words(reason, scale)
        assert what == "It is unlike the fields the model learned from."
        given = ", or the scale that was given (0.19 µm per pixel)," if scale and scale.um_per_px else ""
        assert remedy == f"Another stain, scanner or tissue{given} may be the cause. Judge the slide by eye."


def test_a_rejection_has_nothing_to_do_with_the_scale() -> None:
    assert MISSING not in reason_words("out of focus: 0.1 < 0.5", Scale(2592, 1944, None, SMALL))[1]


def test_an_empty_file_is_not_a_field_without_stain() -> None:
    assert reason_words("empty: 0 bytes")[0] == "The file is empty."
    assert reason_words("empty: stained share 0.0010 < 0.005")[0] == "Hardly anything in it is stained."


def test_other_reasons_stay_as_they_are() -> None:
    assert reason_words("not supported: a HEIC") == ("Not supported: a HEIC.", "", "")
    assert reason_words(None) == ("No reason was stored.", "", "")


def test_a_run_says_how_many_abstentions_lack_a_scale() -> None:
    assert scale_note(0, 5) == ""
    words = scale_note(3, 5)
    assert words.startswith("3 of 5 abstentions are from pictures without a scale, neither stated nor told by red")
    assert "--um-per-px" in words


def test_an_answer_of_unknown_scale_carries_a_caution() -> None:
    assert Scale(112, 112, None, SMALL).caution == SCALE_CAUTION
    assert SCALE_CAUTION.endswith("Do not rely on this answer.")
    for known in (Scale(224, 224, None, SMALL), Scale(112, 112, 0.2, SMALL), Scale(None, None, None, SMALL)):
        assert known.caution == ""
    assert answered_scale_note(0, 7, SMALL) == ""
    assert answered_scale_note(2, 7, SMALL).startswith("2 of 7 answers are to pictures of another size than the")
    assert answered_scale_note(1, 1, SMALL).startswith("1 of 1 answer is to a picture of another size")


def test_confidence_is_said_as_it_was_measured() -> None:
    counted = confidence_words("Pre", 0.67, counted=True, calibrated=True)
    assert counted == "Pre-B: of 100 answers with about this confidence, about 67 were right when that was counted."
    assert "more than 99 were" in confidence_words("Pre", 1.0, counted=True)
    assert "fewer than 1" in confidence_words("Pre", 0.0, counted=True)
    calibrated = confidence_words("Pre", 0.67, calibrated=True)  # nobody has counted answers of this confidence
    assert "about 67 should be right. That is calibrated, not counted." in calibrated
    unknown = confidence_words("Pre", 0.67)
    assert "were" not in unknown
    assert "not known" in unknown


def test_a_likely_class_outside_the_set_is_named() -> None:
    words = set_words(["Benign"], 0.05, (0.5, 0.066, 0.434, 0.0))
    assert words.startswith("Prediction set: Benign. Pre-B (0.434) falls outside the set but is not excluded. This")
    two = set_words(["Benign"], 0.05, (0.5, 0.25, 0.25, 0.0))
    assert "Early Pre-B (0.250) and Pre-B (0.250) fall outside the set but are not excluded." in two
    assert "outside" not in set_words(["Benign"], 0.05, (0.61, 0.199, 0.1, 0.091))
    assert "outside" not in set_words(["Benign", "Pre"], 0.05, (0.5, 0.066, 0.434, 0.0))


def test_repeats_add_no_fields() -> None:
    assert repeated_words({"repeats": 4}, {"fields": 10416}) == "2,604 fields, 4 repeats"
    assert repeated_words({"repeats": 1}, {"fields": 2604}) == "2,604 fields"
    assert repeated_words({}, {"fields": 1000}) == "1,000 fields"


def test_the_likelier_cause_comes_first() -> None:
    dark = "too dark: mean lightness 0.03 < 0.2"
    assert reason_words(dark)[1] == "More light or a longer exposure helps."
    remark = "values reach 4,095 of 65,535: is this 12 bits in 16? If so, save it with its bits stated"
    assert reason_words(dark, remarks=[remark])[1].startswith("The likeliest cause is the file")
    blurred = "out of focus: 0.1 < 0.5"
    assert reason_words(blurred, Scale(224, 224, None, SMALL))[1].startswith("Focus again")
    assert reason_words(blurred, Scale(60, 60, None, SMALL))[1].startswith("It has only 60 × 60 px")


def test_a_damaged_file_is_said_once_with_its_remedy() -> None:
    said = reason_words("damaged: the checksum of chunk IDAT of the PNG is wrong")
    assert said == (
        "The file is damaged (the checksum of chunk IDAT of the PNG is wrong).", "Copy or export it again.", "",
    )  # fmt: skip


def test_a_mean_is_never_rounded_to_certainty() -> None:
    assert [mean_words(v) for v in (None, 0.0, 0.004, 0.006, 0.934, 0.994, 0.995, 1.0)] == [
        "–", "< 0.01", "< 0.01", "0.01", "0.93", "0.99", "> 0.99", "> 0.99",
    ]  # fmt: skip
    assert "no differential count" in MEAN_MALIGNANT_NOTE


def test_why_a_scale_kept_the_model_from_answering() -> None:
    what, remedy, measured = reason_words("no scale: 2 round red cells in the image, 3 are needed; give um_per_px")
    assert what == "Nobody stated its scale, and its red cells do not tell it."
    assert remedy.endswith("--um-per-px, or the column um_per_px of the manifest.")
    assert measured == "2 round red cells in the image, 3 are needed"
    stored = "scale contradicted: stated scale 0.1 µm per pixel, red cells say 0.42; check um_per_px"
    what, remedy, measured = reason_words(stored, where="bench")
    assert what == "The scale that was stated does not fit its red cells."
    assert remedy.endswith("Enter the scale (µm per pixel) on the bench and send the picture again.")
    assert measured == "stated scale 0.1 µm per pixel, red cells say 0.42"


@pytest.mark.parametrize(
    ("um_per_px", "source", "sd", "words"),
    [
        (0.42, "ruler", 0.034, "0.420 ± 0.034 µm per pixel, measured on red cells"),
        (0.25, "metadata", None, "0.250 µm per pixel, as the file states"),
        (0.25, "manifest", None, "0.250 µm per pixel, as stated"),
        (0.25, None, None, "0.250 µm per pixel, as stated"),  # schema 2 knew no other
        (0.147, "assumed", None, "0.147 µm per pixel, an assumption"),
        (None, None, None, ""),
    ],
)
def test_the_scale_in_words(um_per_px: float | None, source: str | None, sd: float | None, words: str) -> None:
    assert scale_words(um_per_px, source, sd) == words


def test_a_measured_scale_is_no_guess_and_is_named_as_measured() -> None:
    measured = Scale(640, 480, 0.19, SMALL, "ruler")
    assert not measured.guessed
    assert measured.caution == ""
    reason = "out of distribution: distance from the training images 9.00 > 1.50"
    assert "or the scale that was measured on red cells (0.19 µm per pixel)" in reason_words(reason, measured)[1]
    assert Scale(224, 224, 0.42, SMALL, "assumed").guessed
