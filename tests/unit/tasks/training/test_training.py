"""Training and evaluation: splits, restarts, calibration, metrics, and the whole of it on synthetic fields."""

from __future__ import annotations

import csv
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import timm
import torch
from sklearn.linear_model import LogisticRegression

from leukoflow.core.errors import ConfigError, SourceError
from leukoflow.flows.train import SWITCHES, ablated, train_config
from leukoflow.models.presets import preset
from leukoflow.runs.records import CLASSES
from leukoflow.tasks.evaluation.images import diagnose_images
from leukoflow.tasks.imaging.classify import softmax
from leukoflow.tasks.training import backbone as backbone_module
from leukoflow.tasks.training import data as train_data
from leukoflow.tasks.training.classifier import (
    INVERSE_RIDGE,
    confidence_threshold,
    conformal_thresholds,
    fit_evidence,
    fit_ood,
    fit_temperature,
    make_bundle,
    moments,
)
from leukoflow.tasks.training.data import Budget, Labels, TrainConfig, balanced_weights, mosaic
from leukoflow.tasks.training.loop import Progress, learning_rate, random_windows, run_steps, stain_jitter
from leukoflow.tasks.training.phases import PHASES, run_phase


def _labels(clusters_per_class: int = 6, fields: int = 25) -> Labels:
    y, cluster = [], []
    for k in range(4):
        for c in range(clusters_per_class):
            y += [k] * fields
            cluster += [f"C{k}{c}"] * fields
    keys = tuple(f"f{i}.jpg" for i in range(len(y)))
    return Labels(keys, np.array(y, np.int64), tuple(cluster), tuple(cluster), "digest")


def test_balance_of_classes_and_clusters() -> None:
    labels = Labels(
        tuple("abcdefg"), np.array([0, 0, 0, 0, 0, 1, 1], np.int64), tuple("xxxxyzz"), tuple("xxxxyzz"), "d"
    )
    weight = balanced_weights(labels, np.arange(7))
    np.testing.assert_allclose(weight, [1 / 12] * 4 + [1 / 6] + [1 / 4] * 2)


def test_labels_are_checked(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no all_fields\.csv"):
        train_data.read_labels(tmp_path)
    path = tmp_path / "all_fields.csv"
    path.write_text("image_key,label\na,Pro\n", "utf-8")
    with pytest.raises(SourceError, match="cluster_id"):
        train_data.read_labels(tmp_path)
    path.write_text("image_key,label,slide_id,cluster_id\na,Pro,s,c\nb,Blast,s,c\n", "utf-8")
    with pytest.raises(SourceError, match="Blast"):
        train_data.read_labels(tmp_path)


def test_mosaic_scales_cells_and_keeps_their_classes() -> None:
    y, x = np.mgrid[:100, :100]
    radius = np.hypot(y - 50, x - 50)
    mask = np.where(radius < 20, 2, np.where(radius < 40, 1, 0)).astype(np.uint8)
    image = np.array([[250] * 3, [150] * 3, [50] * 3], np.uint8)[mask]
    rgb, semantic = mosaic([(image, mask)], 128, np.random.default_rng(0))
    assert rgb.shape == (128, 128, 3)
    assert set(np.unique(semantic)) == {0, 1, 2}
    assert rgb[semantic == 2].mean() < rgb[semantic == 1].mean() < rgb[semantic == 0].mean()
    tile_shares = (semantic > 0).mean(), (mask > 0).mean()
    assert abs(tile_shares[0] - tile_shares[1]) < 0.1


def test_schedule_warms_up_and_ends_near_zero() -> None:
    assert learning_rate(0.0) < 0.05
    assert learning_rate(0.05) == pytest.approx(1, abs=0.01)
    assert learning_rate(1.0) < 0.01
    budget = Budget(steps=100, minutes=2)
    assert Progress(50, 0).share(budget) == 0.5
    assert Progress(50, 90).share(budget) == 0.75


def test_an_interrupted_training_ends_where_an_undisturbed_one_does(tmp_path: Path) -> None:
    def model_of() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))

    def train(model: torch.nn.Module, path: Path, stop: int | None = None) -> torch.nn.Module:
        def loss_of(step: int, progress: float) -> torch.Tensor:
            if step == stop:
                raise KeyboardInterrupt
            x = torch.randn(16, 3, generator=torch.Generator().manual_seed(step))
            return (model(x) - x.sum(1, keepdim=True)).square().mean()

        budget = Budget(steps=12, minutes=60)
        return run_steps(model, loss_of, budget, path, rate=1e-2, save_every_s=0, log=lambda _: None)

    whole = train(model_of(), tmp_path / "a.pt")
    with pytest.raises(KeyboardInterrupt):
        train(model_of(), tmp_path / "b.pt", stop=7)
    resumed = train(model_of(), tmp_path / "b.pt")
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_augmentation_is_seeded_bounded_and_changes_pictures() -> None:
    images = torch.rand(4, 3, 56, 56, generator=torch.Generator().manual_seed(0))

    def draw(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return stain_jitter(random_windows(images, 32, 40.0, generator), generator)

    assert draw(1).shape == (4, 3, 32, 32)
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert 0 <= float(draw(1).min()) <= float(draw(1).max()) <= 1


def test_no_jitter_at_strength_zero() -> None:
    image = torch.rand(2, 3, 8, 8) * 0.98 + 0.01
    torch.testing.assert_close(stain_jitter(image, torch.Generator(), 0.0), image, atol=1e-5, rtol=0)


def test_temperature_undoes_overconfidence() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (4000, 4))
    y = np.array([rng.choice(4, p=p) for p in softmax(logits, 1.0)])
    assert fit_temperature(logits * 3, y) == pytest.approx(3, rel=0.1)


def test_an_odd_cluster_weighs_no_more_than_another() -> None:
    logits = np.tile([3.0, 0.0, 0.0, 0.0], (130, 1))
    y, clusters = np.zeros(130, np.int64), np.array(["a"] * 10 + ["b"] * 10 + ["c"] * 10 + ["odd"] * 100)
    wrong = logits.copy()
    wrong[30:] = wrong[30:, [1, 0, 2, 3]]
    few = fit_temperature(wrong, y, clusters)
    assert few < fit_temperature(wrong, y)
    assert few == pytest.approx(fit_temperature(wrong[[0, 10, 20, 30]], y[:4]))


def test_conformal_quantile_literal() -> None:
    p = np.zeros((24, 4))
    y = np.repeat([0, 1], [19, 5])
    p[:19, 0] = 1 - np.arange(1, 20) / 100
    p[19:, 1] = 0.9
    alone = np.array([str(i) for i in range(24)])
    assert conformal_thresholds(p, y, alone, 0.05) == (pytest.approx(0.19), 1.0, 1.0, 1.0)
    assert conformal_thresholds(p, y, alone, 0.1)[0] == pytest.approx(0.18)


def test_a_small_cluster_moves_the_conformal_quantile() -> None:
    y = np.zeros(102, np.int64)
    p = np.full((102, 4), 0.0)
    p[:100, 0], p[100:, 0] = 0.9, 0.4
    clusters = np.array(["large"] * 100 + ["a", "b"])
    assert conformal_thresholds(p, y, np.array([str(i) for i in range(102)]), 0.05)[0] == pytest.approx(0.1)
    # Weights: 100 of 1/10 and 2 of 1, so that the two hold a sixth.
    assert conformal_thresholds(p, y, clusters, 0.05)[0] == pytest.approx(0.6)


def test_confidence_threshold_refuses_the_unsure_but_not_too_many() -> None:
    p = np.full((200, 4), 0.0)
    p[:, 0] = np.linspace(0.4, 0.99, 200)
    right = np.zeros(200, np.int64)
    assert confidence_threshold(p, right) == 0.0
    wrong_low = right.copy()
    wrong_low[:5] = 1  # answering the 199 surest leaves 4 wrong, which is 2.01 %, the 198 surest 1.5 %
    assert confidence_threshold(p, wrong_low) == pytest.approx(p[2, 0])
    assert confidence_threshold(p, np.ones(200, np.int64)) == pytest.approx(p[3, 0])


def test_moments() -> None:
    mean, std = moments(np.array([[1, 5], [3, 5]], np.float32))
    assert mean.tolist() == [2, 5]
    assert std.tolist() == [1, 1]


def test_whitening_whitens() -> None:
    x = np.random.default_rng(0).normal([1, 2, 3, 4], [5, 2, 1, 0.5], (5000, 4)).astype(np.float32)
    mean, whitening = fit_ood(x)
    np.testing.assert_allclose(mean, [1, 2, 3, 4], atol=0.2)
    np.testing.assert_allclose(np.cov(((x - mean) @ whitening).T), np.eye(4), atol=0.15)


def test_evidence_is_the_optimum_of_ridge_regression_and_absent_classes_get_none() -> None:
    rng = np.random.default_rng(0)
    y = np.repeat([0, 2], 30)
    x = (rng.normal(size=(60, 3)) + y[:, None]).astype(np.float32)
    layer = torch.nn.Linear(3, 4)
    fit_evidence(layer, x, y, np.full(60, 1 / 60))
    with torch.no_grad():
        p = layer(torch.from_numpy(x)).softmax(1).numpy()
    plain = LogisticRegression(C=INVERSE_RIDGE).fit(x, y).predict_proba(x)
    np.testing.assert_allclose(p[:, [0, 2]], plain, atol=1e-3)
    assert p[:, [1, 3]].max() < 1e-9


def test_every_part_can_be_left_out() -> None:
    method = preset("pocket").method
    for name, (section, switch) in SWITCHES.items():
        assert getattr(getattr(ablated(method, [name]), section), switch) is False
    with pytest.raises(ConfigError, match="cannot leave out 'magic'"):
        ablated(method, ["magic"])


def test_less_time_means_fewer_steps() -> None:
    short, whole = train_config(minutes=6), train_config()
    assert short.convnext.steps == round(whole.convnext.steps / 10)
    assert short.convnext.minutes == pytest.approx(whole.convnext.minutes / 10)
    with pytest.raises(ConfigError, match="positive"):
        train_config(minutes=0)


def test_a_work_directory_serves_one_configuration(tmp_path: Path) -> None:
    train_data.open_work(train_config(seed=1), tmp_path)
    train_data.open_work(train_config(seed=1), tmp_path)
    with pytest.raises(ConfigError, match="another seed"):
        train_data.open_work(train_config(seed=2), tmp_path)


# --- the whole of it, on synthetic fields -----------------------------------------------------------------------------

SHADES = {"Benign": (70, 30, 140), "Early": (120, 40, 160), "Pre": (60, 40, 170), "Pro": (140, 20, 100)}


def _field(label: str, rng: np.random.Generator) -> np.ndarray:
    image = np.full((224, 224, 3), 235, np.uint8)
    for _ in range(40):
        cv2.circle(image, tuple(int(v) for v in rng.integers(0, 224, 2)), 8, (215, 150, 155), -1)
    for x, y in ((50, 60), (150, 70), (100, 160)):
        cv2.circle(image, (x, y), 17, (150, 130, 215), -1)
        cv2.circle(image, (x, y), 12, SHADES[label], -1)
    noisy = image.astype(np.int16) + rng.integers(-6, 7, image.shape)
    return np.asarray(noisy.clip(0, 255), np.uint8)


def _synthetic(folder: Path) -> None:
    rng = np.random.default_rng(0)
    folder.mkdir()
    rows = []
    with zipfile.ZipFile(folder / "all_fields.zip", "w") as archive:
        for k, label in enumerate(CLASSES):
            for cluster in range(5):
                for i in range(3):
                    key = f"fields/{label}{cluster}{i}.png"
                    archive.writestr(key, cv2.imencode(".png", _field(label, rng)[..., ::-1])[1].tobytes())
                    rows.append((key, label, f"S{k}{cluster}", f"C{k}{cluster}"))
    with (folder / "all_fields.csv").open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([("image_key", "label", "slide_id", "cluster_id"), *rows])
    with zipfile.ZipFile(folder / "wbc_masks.zip", "w") as archive:
        for i in range(6):
            image, mask = np.full((80, 80, 3), 230, np.uint8), np.zeros((80, 80), np.uint8)
            cv2.circle(image, (40, 40), 24, (150, 130, 215), -1)
            cv2.circle(image, (40, 40), 16, (70, 30, 140), -1)
            cv2.circle(mask, (40, 40), 24, 128, -1)
            cv2.circle(mask, (40, 40), 16, 255, -1)
            archive.writestr(f"d1/{i:03d}.bmp", cv2.imencode(".bmp", image[..., ::-1])[1].tobytes())
            archive.writestr(f"d1/{i:03d}.png", cv2.imencode(".png", mask)[1].tobytes())
            large = [cv2.resize(part, (300, 300), interpolation=cv2.INTER_NEAREST) for part in (image, mask)]
            archive.writestr(f"d2/{i:03d}.bmp", cv2.imencode(".bmp", large[0][..., ::-1])[1].tobytes())
            archive.writestr(f"d2/{i:03d}.png", cv2.imencode(".png", large[1])[1].tobytes())
    _boxed(folder)


def _boxed(folder: Path) -> None:
    """Fields of another source with one boxed white cell each."""
    with (folder / "bccd_fields_boxes.csv").open("w", newline="", encoding="utf-8") as stream:
        rows = csv.writer(stream)
        rows.writerow(("image_key", "cell_type", "xmin_px", "ymin_px", "xmax_px", "ymax_px"))
        with zipfile.ZipFile(folder / "bccd_fields.zip", "w") as archive:
            for i in range(6):
                image = np.full((120, 160, 3), 235, np.uint8)
                cv2.circle(image, (60, 60), 30, (150, 130, 215), -1)
                cv2.circle(image, (60, 60), 20, (70, 30, 140), -1)
                archive.writestr(f"b{i}.jpg", cv2.imencode(".png", image[..., ::-1])[1].tobytes())
                rows.writerow((f"b{i}.jpg", "WBC", 30, 30, 91, 91))
                rows.writerow((f"b{i}.jpg", "RBC", 100, 30, 130, 60))


def _teacher(folder: Path) -> str:
    """A teacher of random weights, stored as the published ones are."""
    torch.manual_seed(0)
    path = folder / "teacher.pth"
    torch.save(timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict(), path)
    return str(path)


@pytest.mark.slow
def test_training_makes_a_bundle_that_diagnoses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbone_module, "BATCH", 32)
    data_dir, work, out = tmp_path / "data", tmp_path / "work", tmp_path / "bundle"
    _synthetic(data_dir)
    brief = Budget(steps=2, minutes=5)
    config = TrainConfig(
        preset="tiny",
        method=ablated(preset("tiny").method, ["unet"]),  # two steps teach no segmenter
        segmenter=brief,
        convnext=Budget(steps=60, minutes=5),
        nasnet=brief,
        classifier_steps=200,
        teacher=_teacher(tmp_path),
    )
    train_data.open_work(config, work)
    for phase in PHASES:
        run_phase(phase, config, data_dir, work, "cpu", torch.get_num_threads())
    data = train_data.load_prepared(config, data_dir, work)
    bundle = make_bundle(config, data, work, out, "synthetic", "test", lambda _: None)
    assert (
        make_bundle(config, data, work, tmp_path / "again", "synthetic", "test", lambda _: None).digest == bundle.digest
    )
    assert bundle.segmenter() is None
    assert len(bundle.spec.training.clusters) == 20
    assert bundle.spec.training.fields == len(data.labels) == 60
    images = list(train_data.read_members(data_dir / "all_fields.zip", data.labels.keys))
    verdicts = diagnose_images(bundle, images)
    y = data.labels.y
    assert np.mean([v.probabilities.argmax() for v in verdicts] == y) > 0.5
    assert all(v.n_cells >= 3 for v in verdicts)
    assert all(v.attention.sum() == pytest.approx(1) for v in verdicts)


@pytest.mark.slow
def test_segmenter_phase_restarts_from_what_is_there(tmp_path: Path) -> None:
    data_dir, work = tmp_path / "data", tmp_path / "work"
    _synthetic(data_dir)
    brief = Budget(steps=2, minutes=5)
    config = TrainConfig(preset="tiny", method=preset("tiny").method, segmenter=brief, convnext=brief, nasnet=brief)
    for phase in ("prepare", "segmenter"):
        run_phase(phase, config, data_dir, work, "cpu", 1)
    made = {p.name: p.stat().st_mtime_ns for p in work.iterdir() if p.suffix != ".log"}
    for phase in ("prepare", "segmenter"):
        run_phase(phase, config, data_dir, work, "cpu", 1)
    assert made == {p.name: p.stat().st_mtime_ns for p in work.iterdir() if p.suffix != ".log"}
    (data_dir / "all_fields.csv").write_text(
        (data_dir / "all_fields.csv").read_text("utf-8").replace("S00", "S99"), "utf-8"
    )
    with pytest.raises(ConfigError, match="changed since"):
        run_phase("segmenter", config, data_dir, work, "cpu", 1)
