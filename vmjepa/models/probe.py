"""Probes on frozen tokens (B, N, D): V-JEPA's attentive classifier, and a linear layer on the mean token.

Parameter names are V-JEPA's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmjepa.errors import ConfigError
from vmjepa.models.layers import init_linears, trunc_normal_
from vmjepa.models.vit import MLP, Block


class _CrossAttention(nn.Module):
    """Queries attend over tokens. `proj` is in the published state dict but, as there, never applied."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ConfigError(f"width {dim} does not divide into {num_heads} attention heads; change their number")
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim).requires_grad_(False)

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        q = self.q(queries).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.kv(tokens).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class _CrossBlock(nn.Module):
    """q += xattn(q, norm1(tokens)); q += mlp(norm2(q)). The queries are not normalised."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.xattn = _CrossAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, 4 * dim)

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        queries = queries + self.xattn(queries, self.norm1(tokens))
        return queries + self.mlp(self.norm2(queries))


class AttentivePooler(nn.Module):
    """One learned query over the tokens, then depth - 1 self-attention blocks on it: (B, N, D) -> (B, 1, D)."""

    def __init__(self, dim: int, num_heads: int, depth: int = 1) -> None:
        super().__init__()
        self.query_tokens = nn.Parameter(torch.zeros(1, 1, dim))
        self.cross_attention_block = _CrossBlock(dim, num_heads)
        if depth > 1:
            self.blocks = nn.ModuleList([Block(dim, num_heads, 4.0, 1e-5) for _ in range(depth - 1)])
        init_linears(self, None)
        trunc_normal_(self.query_tokens.data, None)

    def forward(self, tokens: Tensor) -> Tensor:
        queries = self.cross_attention_block(self.query_tokens.expand(len(tokens), -1, -1), tokens)
        for block in getattr(self, "blocks", ()):
            queries = block(queries)
        return queries


class AttentiveClassifier(nn.Module):
    """V-JEPA's attentive probe: pooled token to logits, (B, N, D) -> (B, classes)."""

    def __init__(self, embed_dim: int, num_heads: int, num_classes: int, depth: int = 1) -> None:
        super().__init__()
        self.pooler = AttentivePooler(embed_dim, num_heads, depth)
        self.linear = nn.Linear(embed_dim, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.linear(self.pooler(tokens)[:, 0])


class LinearProbe(nn.Module):
    """A linear layer on the mean over tokens, (B, N, D) -> (B, classes)."""

    def __init__(self, embed_dim: int, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(embed_dim, num_classes)
        init_linears(self, None)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.linear(tokens.mean(dim=1))
