"""Multi-head self-attention (Vaswani et al. 2017) over the cells of a field, and linear evidence of each cell.

Every cell gives evidence for each class, a linear function of its z-scored features; a field's logits are the average
of its cells' evidence. How much each cell counts is what the self-attention decides: a class token and the cells'
tokens look at each other, and the class token's attention to the cells, starting from their share of the area, is the
weight (attention pooling of instances, after Ilse et al. 2018). So attention times evidence is exactly what a cell
contributed to the answer, and the parts of a cell's picture add up to its evidence.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from leukoflow.core.method import Settings

NEVER = -1e9  # score of what must not be attended to; unlike infinity it leaves no NaN where nothing may be


class ClassifierSpec(Settings):
    """Architecture of the classifier. Without `attention` cells count by their area (ablation)."""

    inputs: int
    classes: int = 4
    width: int = 64
    heads: int = 4
    layers: int = Field(default=1, ge=1)
    dropout: float = 0.2
    attention: bool = True


class Decision(NamedTuple):
    """Logits [N, classes], evidence of each cell [N, M, classes], attention [N, M], which sums to 1 over the cells.

    The logits are the sum of attention times evidence; without any cell they are 0, and so is the attention.
    """

    logits: Tensor
    evidence: Tensor
    attention: Tensor


class SelfAttention(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        """`width` must be a multiple of `heads`."""
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, seen: Tensor) -> Tensor:
        """Map `tokens` [N, T, W], `seen` bool [N, T] to tokens."""
        n, t, width = tokens.shape
        q, k, v = self.qkv(self.norm1(tokens)).view(n, t, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) / (width // self.heads) ** 0.5
        weights = scores.masked_fill(~seen[:, None, None, :], NEVER).softmax(-1)
        mixed = (weights @ v).transpose(1, 2).reshape(n, t, width)
        tokens = tokens + self.dropout(self.project(mixed))
        out: Tensor = tokens + self.dropout(self.mlp(self.norm2(tokens)))
        return out


class ClassAttention(nn.Module):
    """The class token's attention to the cells, on top of what each counts beforehand. Starts without an opinion."""

    def __init__(self, width: int, heads: int) -> None:
        """`width` must be a multiple of `heads`."""
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        nn.init.zeros_(self.query.weight)
        nn.init.zeros_(self.query.bias)

    def forward(self, tokens: Tensor, prior: Tensor) -> Tensor:
        """Map `tokens` [N, 1 + M, W], class token first, and `prior` [N, M] to attention [N, M], a mean over heads."""
        n, t, width = tokens.shape
        tokens = self.norm(tokens)
        query = self.query(tokens[:, :1]).view(n, 1, self.heads, width // self.heads).transpose(1, 2)
        key = self.key(tokens[:, 1:]).view(n, t - 1, self.heads, width // self.heads).transpose(1, 2)
        scores = (query @ key.transpose(-2, -1))[:, :, 0] / (width // self.heads) ** 0.5
        out: Tensor = (scores + prior[:, None]).softmax(-1).mean(1)
        return out


class AttentionClassifier(nn.Module):
    """[class, cells] -> how much each cell counts -> weighted evidence."""

    def __init__(self, spec: ClassifierSpec) -> None:
        """Random weights."""
        super().__init__()
        self.spec = spec
        self.evidence = nn.Linear(spec.inputs, spec.classes)
        if spec.attention:
            self.embed = nn.Sequential(nn.Dropout(spec.dropout), nn.Linear(spec.inputs, spec.width))
            self.class_token = nn.Parameter(torch.randn(spec.width) * 0.02)
            self.blocks = nn.ModuleList(SelfAttention(spec.width, spec.heads, spec.dropout) for _ in range(spec.layers))
            self.pool = ClassAttention(spec.width, spec.heads)

    def forward(self, cells: Tensor, area: Tensor, valid: Tensor) -> Decision:
        """Classify fields by their cells.

        `cells` [N, M, K] z-scored, `area` [N, M] in pixels, `valid` bool [N, M] (False where padded)."""
        prior = area.clamp(min=1.0).log().masked_fill(~valid, NEVER)
        if self.spec.attention:
            tokens = torch.cat([self.class_token.expand(len(cells), 1, -1), self.embed(cells)], 1)
            seen = torch.cat([torch.ones_like(valid[:, :1]), valid], 1)
            for block in self.blocks:
                tokens = block(tokens, seen)
            attention = self.pool(tokens, prior)
        else:
            attention = prior.softmax(-1)
        attention = attention * valid
        evidence = self.evidence(cells)
        return Decision((attention[..., None] * evidence).sum(1), evidence, attention)
