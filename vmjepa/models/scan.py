"""The selective scan and the causal convolution of Mamba: one signature, two backends.

    s_t = exp(delta_t A) s_{t-1} + delta_t B_t u_t        y_t = <C_t, s_t> + D u_t        out_t = y_t * SiLU(z_t)

"cpu" is plain PyTorch: it keeps no per-step state for the backward pass but recomputes it chunk by chunk, so that it is
both the reference and fast enough to train small models. "mamba-ssm" calls the compiled CUDA kernels of the mamba-ssm
and causal-conv1d packages, imported on first use. The device decides; the environment variable VMJEPA_SCAN (cpu or
mamba-ssm) overrides it. Formula: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces".
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from vmjepa.errors import ConfigError

BACKENDS = ("cpu", "mamba-ssm")

# Elements (batch x channels x states) of one step, enough to hide the cost of a call; and of one chunk of steps: three
# such buffers stay in the last-level cache.
_STEP_ELEMENTS = 1 << 15
_CHUNK_ELEMENTS = 1 << 19


def choose_backend(device: torch.device, backend: str | None = None) -> str:
    """The backend for tensors on `device`: the argument, else VMJEPA_SCAN, else by device.

    Raises ConfigError for an unknown name, and for CUDA tensors where mamba-ssm's kernels are missing: the CPU backend
    would run there, hundreds of times slower than expected, so it has to be asked for.
    """
    asked = backend or os.environ.get("VMJEPA_SCAN") or None
    if asked is not None and asked not in BACKENDS:
        raise ConfigError(f"selective scan backend {asked!r} is unknown; use one of {', '.join(BACKENDS)}")
    chosen = asked or ("cpu" if device.type == "cpu" else "mamba-ssm")
    if chosen == "mamba-ssm" and device.type != "cuda":
        raise ConfigError(f"selective scan backend mamba-ssm needs CUDA tensors, not {device.type}; unset VMJEPA_SCAN")
    if chosen == "mamba-ssm":
        _import_kernel("mamba_ssm.ops.selective_scan_interface", "selective_scan_cuda")
        _import_kernel("causal_conv1d", "causal_conv1d_cuda")
    return chosen


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scans u along its last axis; the arguments are those of mamba-ssm's selective_scan_fn.

    u, delta, z: (batch, dim, L). A: (dim, n), real, negative. B, C: (batch, G, n, L) where channel k uses group
    k // (dim / G), or (batch, n, L) for one group, or (dim, n) constant in time. D, delta_bias: (dim,).
    delta_bias is added to delta before the softplus. Returns out (batch, dim, L) in u's dtype, and with
    return_last_state also the state after the last step (batch, dim, n). Arithmetic is fp32, or fp64 for fp64 inputs.
    A pre-softplus delta of -1e4 passes the state through a step unchanged, exactly.
    """
    groups = _check_groups(u.shape[1], B, C)
    if A.is_complex():
        raise ValueError("selective_scan: complex A is not supported")
    if choose_backend(u.device, backend) == "mamba-ssm":
        kernel = _import_kernel("mamba_ssm.ops.selective_scan_interface", "selective_scan_cuda")
        return kernel.selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)
    with torch.autocast(u.device.type, enabled=False):
        out, last_state = _scan_cpu(u, delta, A, B, C, D, z, delta_bias, delta_softplus, groups)
    out = out.to(u.dtype)
    return (out, last_state) if return_last_state else out


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = "silu",
    backend: str | None = None,
) -> Tensor:
    """Depthwise convolution along the last axis that looks only back, then SiLU (or nothing: activation None).

    x: (batch, dim, L), zero before its start. weight: (dim, width); its last column multiplies the current step.
    """
    if activation not in ("silu", None):
        raise ValueError(f"causal_conv1d: activation {activation!r} is not one of 'silu', None")
    if choose_backend(x.device, backend) == "mamba-ssm":
        kernel = _import_kernel("causal_conv1d", "causal_conv1d_cuda")
        return kernel.causal_conv1d_fn(x.contiguous(), weight, bias, activation=activation)
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        bias = weight.new_zeros(len(weight)) if bias is None else bias
        y = _CausalConv.apply(x.to(dtype).transpose(1, 2), weight.to(dtype), bias.to(dtype))
        y = F.silu(y) if activation == "silu" else y
        return y.to(x.dtype).transpose(1, 2)


def _check_groups(dim: int, B: Tensor, C: Tensor) -> int:
    """Number of groups of B and C. The CUDA kernel reads out of bounds when it does not divide dim, so check here."""
    groups = {t.shape[1] for t in (B, C) if t.dim() == 4} or {1}
    count = max(groups)
    if dim % count or len(groups - {1}) > 1:
        raise ValueError(f"selective_scan: {dim} channels cannot be shared by groups {sorted(groups)} of B and C")
    return count


def _import_kernel(module: str, compiled: str) -> ModuleType:
    """Imports a kernel package on first use; ConfigError with the reason and the remedy when it cannot be."""
    import importlib

    try:
        importlib.import_module(compiled)
        return importlib.import_module(module)
    except Exception as error:  # a build for another PyTorch raises all kinds: ImportError, OSError, AttributeError
        raise ConfigError(
            f"the compiled Mamba kernel {compiled} cannot be imported ({type(error).__name__}: {error}); install "
            "mamba-ssm and causal-conv1d built for this PyTorch and CUDA (the CUDA image has them), run on the CPU, "
            "or set VMJEPA_SCAN=cpu to use the slow reference on the GPU"
        ) from error


def _scan_cpu(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    groups: int,
) -> tuple[Tensor, Tensor]:
    """Brings the inputs into the type and layout of _ChunkedScan and its results back."""
    dim, n = A.shape
    dtype = torch.promote_types(u.dtype, torch.float32)
    u, delta, A, B, C = (v.to(dtype) for v in (u, delta, A, B, C))
    D, delta_bias = (u.new_zeros(dim) if v is None else v.to(dtype) for v in (D, delta_bias))
    y, last_state = _ChunkedScan.apply(
        _time_first(u, groups),
        _time_first(delta, groups),
        A.unflatten(0, (groups, -1)).transpose(1, 2).contiguous(),
        _state_weights(B, groups),
        _state_weights(C, groups),
        D.view(groups, -1),
        delta_bias.view(groups, -1),
        delta_softplus,
    )
    out = y.permute(1, 2, 3, 0).flatten(1, 2)
    if z is not None:
        out = out * F.silu(z.to(dtype))
    return out, last_state.transpose(2, 3).reshape(u.shape[0], dim, n)


def _time_first(x: Tensor, groups: int) -> Tensor:
    """(batch, dim, L) -> (L, batch, G, dim/G) with the channels contiguous; a view where x's memory allows it."""
    x = x.unflatten(1, (groups, -1)).permute(3, 0, 1, 2)
    return x if x.stride(-1) == 1 else x.contiguous()


def _state_weights(x: Tensor, groups: int) -> Tensor:
    """B or C -> (L, batch, G, n, 1) when it varies in time, (1, 1, G, n, dim/G) when it is constant."""
    if x.dim() == 2:
        return x.unflatten(0, (groups, -1)).transpose(1, 2)[None, None].contiguous()
    if x.dim() == 3:
        x = x[:, None]
    return x.expand(-1, groups, -1, -1).permute(3, 0, 1, 2)[..., None].contiguous()


class _ChunkedScan(torch.autograd.Function):
    """The scan of u, delta (L, b, G, d) with A (G, n, d), D, bias (G, d), and B and C as _state_weights makes them.

    Returns y (L, b, G, d) and the last state (b, G, n, d). Time is cut into chunks; within one, everything but the
    recurrence itself is a handful of large operations, and each step is one fused multiply-add in place. Only the state
    at the start of each chunk is kept: the backward pass recomputes the others.
    """

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor, softplus: bool
    ) -> tuple[Tensor, Tensor]:
        length, batch, groups, dim = u.shape
        blocks = _Blocks.of(length, batch, A.numel())
        ctx.blocks, ctx.softplus = blocks, softplus
        decay, states = blocks.buffer(A), blocks.buffer(A)
        starts = u.new_empty(len(blocks.times), batch, *A.shape)
        last = u.new_empty(batch, *A.shape)
        y = u.new_empty(batch, length, groups, dim).transpose(0, 1)
        for rows in blocks.rows:
            state = torch.zeros_like(last[rows])
            for k, now in enumerate(blocks.times):
                starts[k, rows] = state
                at = (now, rows)
                dt = _step_sizes(delta[at], bias, softplus)
                _, h = _run_chunk(dt, dt * u[at], A, _at(B, at), starts[k, rows], decay, states)
                torch.addcmul(_weigh_states(_at(C, at), h[1:]), D, u[at], out=y[at])
                state = h[-1]
            last[rows] = state
        ctx.save_for_backward(u, delta, A, B, C, D, bias, starts)
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad_y.device.type, enabled=False):
            return *_backward(ctx.saved_tensors, ctx.blocks, ctx.softplus, grad_y, grad_last), None


def _backward(
    saved: tuple[Tensor, ...], blocks: _Blocks, softplus: bool, grad_y: Tensor, grad_last: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of the seven tensors. With g_t the gradient of s_t: g_t = C_t dy_t + exp(delta_{t+1} A) g_{t+1}."""
    u, delta, A, B, C, D, bias, starts = saved
    decay, states, grads = (blocks.buffer(A) for _ in range(3))
    length, batch, *channels = u.shape
    grad_u, grad_delta = (u.new_empty(batch, length, *channels).transpose(0, 1) for _ in range(2))
    grad_A, grad_B, grad_C, grad_D, grad_bias = (torch.zeros_like(v) for v in (A, B, C, D, bias))
    for rows in blocks.rows:
        carry = grad_last[rows]
        for k, now in reversed(list(enumerate(blocks.times))):
            at = (now, rows)
            b, dy, dt = _at(B, at), grad_y[at].contiguous(), _step_sizes(delta[at], bias, softplus)
            x = dt * u[at]
            a, h = _run_chunk(dt, x, A, b, starts[k, rows], decay, states)
            g = torch.mul(_at(C, at), dy[..., None, :], out=_front(grads, a.shape))
            a_steps, g_steps = a.unbind(), g.unbind()
            g_steps[-1].add_(carry)
            for i in range(len(g_steps) - 2, -1, -1):
                g_steps[i].addcmul_(a_steps[i + 1], g_steps[i + 1])
            carry = a_steps[0] * g_steps[0]
            _add_weight_grad(_at(grad_C, at), h[1:], dy)
            _add_weight_grad(_at(grad_B, at), g, x)
            grad_x = _weigh_states(b, g)
            torch.mul(grad_x, dt, out=grad_u[at]).addcmul_(D, dy)
            grad_D += (dy * u[at]).sum((0, 1))
            by_decay = a.mul_(h[:-1]).mul_(g)  # gradient of delta_t A; the states are not needed from here on
            grad_dt = torch.mul(by_decay, A, out=h[1:]).sum(-2).addcmul_(grad_x, u[at])
            grad_A += by_decay.mul_(dt[..., None, :]).sum((0, 1))
            if softplus:  # its slope is 1 - exp(-dt)
                grad_dt.mul_(torch.expm1(-dt).neg_())
            grad_delta[at] = grad_dt
            grad_bias += grad_dt.sum((0, 1))
    return grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_bias


def _step_sizes(delta: Tensor, bias: Tensor, softplus: bool) -> Tensor:
    delta = delta + bias
    return F.softplus(delta) if softplus else delta


@dataclass(frozen=True)
class _Blocks:
    """How the work is cut: slices of the batch, and within each, slices of time."""

    rows: list[slice]
    times: list[slice]

    @staticmethod
    def of(length: int, batch: int, elements: int) -> _Blocks:
        """Cuts for a batch with `elements` (channels x states) per row and step."""
        rows = max(1, min(batch, _STEP_ELEMENTS // elements))
        steps = max(1, min(length, _CHUNK_ELEMENTS // (rows * elements)))
        return _Blocks(_slices(batch, rows), _slices(length, steps))

    def buffer(self, A: Tensor) -> Tensor:
        """Flat room for the largest chunk and its starting state, once per call: fresh memory pages are slow."""
        return A.new_empty((self.times[0].stop + 1) * self.rows[0].stop * A.numel())


def _slices(total: int, largest: int) -> list[slice]:
    """Even cuts of range(total), none larger than `largest`; the first is never the smaller one."""
    size = math.ceil(total / math.ceil(total / largest))
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def _front(buffer: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The beginning of a flat buffer in the given shape."""
    return buffer[: math.prod(shape)].view(shape)


def _run_chunk(
    dt: Tensor, x: Tensor, A: Tensor, B: Tensor, start: Tensor, decay: Tensor, states: Tensor
) -> tuple[Tensor, Tensor]:
    """Fills the buffers for a chunk with x = dt * u. Returns decays exp(dt A) (T, b, G, n, d), states (T + 1, ...)."""
    steps = len(dt)
    # exp2 with the factor folded into A: several times faster than exp in PyTorch's CPU kernels
    decay = torch.mul(dt[..., None, :], A * math.log2(math.e), out=_front(decay, (steps, *start.shape))).exp2_()
    states = _front(states, (steps + 1, *start.shape))
    states[0] = start
    torch.mul(B, x[..., None, :], out=states[1:])
    previous = states[0]
    for a, state in zip(decay.unbind(), states[1:].unbind(), strict=True):
        previous = state.addcmul_(a, previous)
    return decay, states


def _at(x: Tensor, at: tuple[slice, slice]) -> Tensor:
    """The time steps and batch rows `at` of B or C; all of it when it is constant."""
    return x[at] if x.shape[-1] == 1 else x


def _weigh_states(weights: Tensor, states: Tensor) -> Tensor:
    """Sums states (T, b, G, n, d) over n with the weights of B or C: (T, b, G, d)."""
    if weights.shape[-1] != 1:
        return (weights * states).sum(-2)
    n, dim = states.shape[-2:]
    return torch.bmm(weights.reshape(-1, 1, n), states.reshape(-1, n, dim)).view(*states.shape[:3], dim)


def _add_weight_grad(grad: Tensor, states: Tensor, x: Tensor) -> None:
    """Adds the gradient of B or C: states (T, b, G, n, d) against x (T, b, G, d)."""
    if grad.shape[-1] != 1:
        grad += (states * x[..., None, :]).sum((0, 1))
        return
    n, dim = states.shape[-2:]
    # a row vector times the transposed states: ten times faster than the states times a column vector
    grad += torch.bmm(x.reshape(-1, 1, dim), states.reshape(-1, n, dim).transpose(1, 2)).view(grad.shape)


class _CausalConv(torch.autograd.Function):
    """On x (b, L, dim), weight (dim, width): shifted multiply-adds, for 4 taps faster than the general convolution."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, weight)
        y = torch.addcmul(bias, x, weight[:, -1])
        for back in range(1, min(weight.shape[1], x.shape[1])):
            y[:, back:].addcmul_(x[:, :-back], weight[:, -1 - back])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = grad * weight[:, -1]
        grad_weight = torch.zeros_like(weight)
        grad_weight[:, -1] = (grad * x).sum((0, 1))
        for back in range(1, min(weight.shape[1], x.shape[1])):
            grad_x[:, :-back].addcmul_(grad[:, back:], weight[:, -1 - back])
            grad_weight[:, -1 - back] = (grad[:, back:] * x[:, :-back]).sum((0, 1))
        return grad_x, grad_weight, grad.sum((0, 1))
