"""Attention U-Net: shapes, the gate, and that it learns."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from leukoflow.models.attention_unet import AttentionGate, AttentionUNet, UNetSpec, segment_batch
from leukoflow.tasks.evaluation.segmentation import dice
from leukoflow.tasks.training.loop import to_tensor
from leukoflow.tasks.training.segmenter import segmentation_loss

SMALL = UNetSpec(widths=(4, 8))


@pytest.mark.parametrize("size", [(224, 224), (64, 48), (33, 57), (2, 3)])
def test_logits_have_the_size_of_the_field(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = AttentionUNet(SMALL).eval()
    with torch.inference_mode():
        assert model(torch.rand(2, 3, *size)).shape == (2, 3, *size)


def test_gate_passes_between_nothing_and_everything() -> None:
    gate = AttentionGate(4, 8)
    skip, signal = torch.rand(1, 4, 8, 8), torch.rand(1, 8, 4, 4)
    with torch.no_grad():
        gate.weight.weight.zero_()
        for bias, factor in ((-50.0, 0.0), (0.0, 0.5), (50.0, 1.0)):
            gate.weight.bias.fill_(bias)  # type: ignore[union-attr]
            torch.testing.assert_close(gate(skip, signal), skip * factor)


def test_a_field_does_not_depend_on_its_neighbours() -> None:
    torch.manual_seed(1)
    model = AttentionUNet(SMALL).eval()
    rng = np.random.default_rng(0)
    fields = rng.integers(0, 256, (4, 64, 64, 3), np.uint8)
    others = fields.copy()
    others[1:] = 255 - others[1:]
    a, b = segment_batch(model, fields, "cpu"), segment_batch(model, others, "cpu")
    assert a.dtype == np.uint8
    assert a.shape == (4, 64, 64)
    assert set(np.unique(a)) <= {0, 1, 2}
    np.testing.assert_array_equal(a[0], b[0])


@pytest.mark.slow
def test_learns_to_find_discs() -> None:
    torch.manual_seed(0)
    y, x = np.mgrid[:48, :48]
    radius = np.hypot(y - 24, x - 24)
    truth = np.where(radius < 7, 2, np.where(radius < 13, 1, 0)).astype(np.uint8)
    image = np.array([[240, 240, 240], [170, 150, 220], [80, 40, 140]], np.uint8)[truth]
    batch, target = to_tensor(image[None], "cpu"), torch.from_numpy(truth[None]).long()
    model = AttentionUNet(SMALL)
    optimiser = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(60):
        optimiser.zero_grad()
        loss = segmentation_loss(model(batch), target)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    found = segment_batch(model.eval(), image[None], "cpu")[0]
    assert dice(found == 2, truth == 2) > 0.8
    assert dice(found > 0, truth > 0) > 0.9


def test_dice_literal() -> None:
    a, b = np.array([1, 1, 0, 0], bool), np.array([1, 0, 1, 0], bool)
    assert dice(a, b) == 0.5
    assert dice(a, a) == 1.0
    assert dice(a & ~a, b & ~b) == 1.0


def test_loss_is_least_for_the_truth() -> None:
    target = torch.tensor([[[0, 1], [2, 1]]])
    right = torch.nn.functional.one_hot(target, 3).permute(0, 3, 1, 2).float() * 40
    wrong = right.roll(1, dims=1)
    assert float(segmentation_loss(right, target)) < 1e-3
    assert float(segmentation_loss(wrong, target)) > 1
