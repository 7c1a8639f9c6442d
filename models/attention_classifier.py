"""Multi-head self-attention (Vaswani et al. 2017) over a class token, the field's token and its cells' tokens.

The class token's attention to the cells, averaged over heads of the last layer, says which cells carried the
decision. An auxiliary per-cell head keeps the cells' tokens informative by themselves.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from leukoflow.method import Settings


class ClassifierSpec(Settings):
    """Architecture of the classifier. Without `attention` the tokens are averaged instead (ablation)."""

    inputs: int
    classes: int = 4
    width: int = 96
    heads: int = 4
    layers: int = Field(default=1, ge=1)
    dropout: float = 0.2
    attention: bool = True


class Decision(NamedTuple):
    """Logits [N, classes], per-cell logits [N, M, classes], class token's attention to cells [N, M] (sum <= 1)."""

    logits: Tensor
    cell_logits: Tensor
    attention: Tensor


class SelfAttention(nn.Module):
    """Pre-norm transformer block that also returns the attention weights, averaged over heads."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        """`width` must be a multiple of `heads`."""
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """`tokens` [N, T, W], `valid` bool [N, T] -> tokens, attention [N, T, T]."""
        n, t, width = tokens.shape
        q, k, v = self.qkv(self.norm1(tokens)).view(n, t, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) / (width // self.heads) ** 0.5
        weights = scores.masked_fill(~valid[:, None, None, :], float("-inf")).softmax(-1)
        mixed = (weights @ v).transpose(1, 2).reshape(n, t, width)
        tokens = tokens + self.dropout(self.project(mixed))
        return tokens + self.dropout(self.mlp(self.norm2(tokens))), weights.mean(1)


class AttentionClassifier(nn.Module):
    """[CLS, field, cells] -> classes."""

    def __init__(self, spec: ClassifierSpec) -> None:
        """Random weights."""
        super().__init__()
        self.spec = spec
        self.embed = nn.Sequential(nn.Dropout(spec.dropout), nn.Linear(spec.inputs, spec.width))
        self.cls_token = nn.Parameter(torch.randn(spec.width) * 0.02)
        self.field_token = nn.Parameter(torch.randn(spec.width) * 0.02)
        blocks = (SelfAttention(spec.width, spec.heads, spec.dropout) for _ in range(spec.layers))
        self.blocks = nn.ModuleList(blocks if spec.attention else ())
        self.norm = nn.LayerNorm(spec.width)
        self.head = nn.Linear(spec.width, spec.classes)
        self.cell_head = nn.Linear(spec.width, spec.classes)

    def forward(self, field: Tensor, cells: Tensor, valid: Tensor, use_field: Tensor | None = None) -> Decision:
        """`field` [N, K], `cells` [N, M, K], `valid` bool [N, M] (False where padded), `use_field` bool [N]."""
        n, m, _ = cells.shape
        if use_field is None:
            use_field = torch.ones(n, dtype=torch.bool, device=cells.device)
        cell_tokens = self.embed(cells)
        field_token = (self.embed(field) + self.field_token)[:, None]
        cell_logits = self.cell_head(F.gelu(cell_tokens))
        cls = self.cls_token.expand(n, 1, -1)
        tokens = torch.cat([cls, field_token, cell_tokens], 1)
        seen = torch.cat([torch.ones_like(use_field)[:, None], use_field[:, None], valid], 1)
        if self.spec.attention:
            weights = tokens.new_zeros(n, m + 2, m + 2)
            for block in self.blocks:
                tokens, weights = block(tokens, seen)
            return Decision(self.head(self.norm(tokens[:, 0])), cell_logits, weights[:, 0, 2:])
        share = seen.to(tokens.dtype) / seen.sum(1, keepdim=True)
        pooled = (tokens * share[..., None]).sum(1)
        return Decision(self.head(self.norm(pooled)), cell_logits, share[:, 2:])
