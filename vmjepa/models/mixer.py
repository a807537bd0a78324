"""The bidirectional Mamba mixer of Vim and VideoMamba, both directions in one convolution and one scan, and its block.

With [x | z] = in_proj(u), each direction runs convolution, projections and scan with its own parameters, the backward
one (names with _b) on the time-reversed x:

    out = out_proj((y_forward + reversed(y_backward)) * SiLU(z))

The directions are stacked as channels, so that the scan sees two groups of B and C. Parameter names are VideoMamba's.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmjepa.models.layers import DropPath, InitStd, RMSNorm, drop_path_rates, init_linears, run_block
from vmjepa.models.scan import causal_conv1d, selective_scan

# Pre-softplus step size of padding: softplus(-1e4 + any sane bias) is exactly 0, so the state passes unchanged.
_SKIP = -1e4
DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 1e-1, 1e-4


class BiMamba(nn.Module):
    """Bidirectional selective state-space mixer, (B, L, dim) -> (B, L, dim).

    Args:
        dim: width; the inner width is expand * dim. d_state: states per channel. d_conv: width of the convolution.
    """

    def __init__(self, dim: int, d_state: int = 16, d_conv: int = 4, expand: int = 2) -> None:
        super().__init__()
        inner, rank = expand * dim, math.ceil(dim / 16)
        self.inner, self.rank, self.d_state = inner, rank, d_state
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, d_conv, groups=inner)
        self.conv1d_b = nn.Conv1d(inner, inner, d_conv, groups=inner)
        self.x_proj = nn.Linear(inner, rank + 2 * d_state, bias=False)
        self.x_proj_b = nn.Linear(inner, rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.dt_proj_b = nn.Linear(rank, inner)
        decay_rates = torch.arange(1, d_state + 1, dtype=torch.float32).log().repeat(inner, 1)
        self.A_log = nn.Parameter(decay_rates)
        self.A_b_log = nn.Parameter(decay_rates.clone())
        self.D = nn.Parameter(torch.ones(inner))
        self.D_b = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, u: Tensor, lengths: Tensor | None = None) -> Tensor:
        """u: (B, L, dim). With lengths (B,), tokens from lengths[b] on are padding: they influence no real token, and
        their own outputs mean nothing."""
        padded = None
        if lengths is not None:
            padded = torch.arange(u.shape[1], device=u.device) >= lengths[:, None]
            u = u.masked_fill(padded[..., None], 0.0)
        x, z = self.in_proj(u).chunk(2, dim=-1)
        y = self._scan(torch.cat([x, x.flip(1)], dim=-1), padded)
        y = y[..., : self.inner] + y[..., self.inner :].flip(1)
        return self.out_proj(y * F.silu(z))

    def _scan(self, x: Tensor, padded: Tensor | None) -> Tensor:
        """Convolution, projections and scan of the stacked directions x (B, L, 2I), the second one time-reversed."""
        batch, length, _ = x.shape
        taps = self._both(self.conv1d.weight, self.conv1d_b.weight).flatten(0, 1)[:, 0]
        channels = causal_conv1d(x.transpose(1, 2), taps, self._both(self.conv1d.bias, self.conv1d_b.bias).flatten())
        directions = channels.transpose(1, 2).reshape(batch * length, 2, self.inner).transpose(0, 1)
        projected = torch.bmm(directions, self._both(self.x_proj.weight, self.x_proj_b.weight).transpose(1, 2))
        dt, B, C = projected.split([self.rank, self.d_state, self.d_state], dim=2)
        delta = torch.bmm(dt, self._both(self.dt_proj.weight, self.dt_proj_b.weight).transpose(1, 2))
        delta = delta.transpose(0, 1).reshape(batch, length, 2, self.inner)
        if padded is not None:
            reversed_too = torch.stack([padded, padded.flip(1)], dim=2)
            delta = delta.masked_fill(reversed_too[..., None], _SKIP)
        B, C = (v.view(2, batch, length, self.d_state).permute(1, 0, 3, 2) for v in (B, C))
        y = selective_scan(
            channels,
            delta.flatten(2).transpose(1, 2),
            -torch.exp(self._both(self.A_log, self.A_b_log).flatten(0, 1)),
            B,
            C,
            D=self._both(self.D, self.D_b).flatten(),
            delta_bias=self._both(self.dt_proj.bias, self.dt_proj_b.bias).flatten(),
            delta_softplus=True,
        )
        assert isinstance(y, Tensor)
        return y.transpose(1, 2)

    def _both(self, forward: Tensor | None, backward: Tensor | None) -> Tensor:
        """The two directions' parameters stacked. Under ZeRO-3 parameters of submodules that are never called are
        gathered only for the module they are registered with: this one."""
        assert forward is not None
        assert backward is not None
        for parameter in (forward, backward):
            if hasattr(parameter, "ds_id"):
                import deepspeed

                deepspeed.zero.register_external_parameter(self, parameter)
        return torch.stack([forward, backward])

    @torch.no_grad()
    def reset_parameters(self, depth: int, dt_init: str, std: InitStd) -> None:
        """Initial weights in a network of `depth` blocks: Linears truncated normal, out_proj uniform / sqrt(depth).

        dt_init "mamba": Mamba's own, so that steps start between 0.001 and 0.1 and memories reach over tens to hundreds
        of tokens. "official": VideoMamba's generic rule, which leaves the bias at 0 and so a step of 0.69: a token is
        forgotten after one or two others.
        """
        init_linears(self, std)
        nn.init.kaiming_uniform_(self.out_proj.weight, a=math.sqrt(5))
        self.out_proj.weight /= math.sqrt(depth)
        if dt_init == "mamba":
            for projection in (self.dt_proj, self.dt_proj_b):
                nn.init.uniform_(projection.weight, -(self.rank**-0.5), self.rank**-0.5)
                low, high = math.log(DT_MIN), math.log(DT_MAX)
                dt = torch.exp(torch.rand_like(projection.bias) * (high - low) + low).clamp(min=DT_FLOOR)
                projection.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus


class MambaBlock(nn.Module):
    """Add, norm, mix: residual += drop_path(hidden); hidden = mixer(norm(residual)). The residual stays in fp32."""

    def __init__(self, dim: int, drop_path: float, eps: float, d_state: int, d_conv: int, expand: int) -> None:
        super().__init__()
        self.mixer = BiMamba(dim, d_state, d_conv, expand)
        self.norm = RMSNorm(dim, eps)
        self.drop_path = DropPath(drop_path)

    def forward(self, hidden: Tensor, residual: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        residual = add_residual(self.drop_path(hidden), residual)
        return self.mixer(self.norm(residual), lengths), residual


def add_residual(hidden: Tensor, residual: Tensor | None) -> Tensor:
    """residual + hidden in fp32 or wider."""
    if residual is None:
        return hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    return residual + hidden.to(residual.dtype)


def mamba_blocks(
    dim: int,
    depth: int,
    drop_path: float = 0.0,
    eps: float = 1e-5,
    d_state: int = 16,
    d_conv: int = 4,
    expand: int = 2,
) -> nn.ModuleList:
    """`depth` blocks. A block drops the branch that the one before it made, so the first two have rate 0, as VideoMamba
    has it; the last branch is dropped in front of the final norm."""
    rates = [0.0, *drop_path_rates(drop_path, depth)]
    return nn.ModuleList([MambaBlock(dim, rates[i], eps, d_state, d_conv, expand) for i in range(depth)])


def run_mamba_blocks(
    blocks: nn.ModuleList, drop_last: DropPath, tokens: Tensor, lengths: Tensor | None, use_checkpoint: bool = False
) -> Tensor:
    """tokens (B, L, dim) through the blocks, the last branch through drop_last: the input of the final norm."""
    hidden, residual = tokens, None
    for block in blocks:
        hidden, residual = run_block(block, use_checkpoint, hidden, residual, lengths)
    return add_residual(drop_last(hidden), residual)
