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
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from vmjepa.errors import ConfigError

BACKENDS = ("cpu", "mamba-ssm")

# Elements (time steps x batch x channels x states) worked on at once: three such buffers stay in the last-level cache.
_CHUNK_ELEMENTS = 1 << 19
_MAX_CHUNK_STEPS = 64


def choose_backend(device: torch.device, backend: str | None = None) -> str:
    """The backend for tensors on `device`: the argument, else VMJEPA_SCAN, else by device.

    Raises ConfigError for an unknown name, and for CUDA tensors where mamba-ssm's kernels are missing: the CPU backend
    would run there, hundreds of times slower than expected, so it has to be asked for.
    """
    asked = backend or os.environ.get("VMJEPA_SCAN") or None
    if asked is not None and asked not in BACKENDS:
        raise ConfigError(f"selective scan backend {asked!r} is unknown; use one of {', '.join(BACKENDS)} (VMJEPA_SCAN)")
    chosen = asked or ("cpu" if device.type == "cpu" else "mamba-ssm")
    if chosen == "mamba-ssm" and device.type != "cuda":
        raise ConfigError(f"selective scan backend mamba-ssm needs CUDA tensors, not {device.type}; unset VMJEPA_SCAN")
    if chosen == "mamba-ssm":
        _import_kernel("mamba_ssm.ops.selective_scan_interface", "selective_scan_cuda")
        _import_kernel("causal_conv1d", "causal_conv1d_cuda")
    return chosen


def selective_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
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
    dtype = torch.promote_types(u.dtype, torch.float32)
    with torch.autocast(u.device.type, enabled=False):
        wide = [None if v is None else v.to(dtype) for v in (u, delta, A, B, C, D, z, delta_bias)]
        out, last_state = _scan_cpu(*wide, delta_softplus=delta_softplus, groups=groups)
    out = out.to(u.dtype)
    return (out, last_state) if return_last_state else out


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = "silu",
    backend: str | None = None,
) -> torch.Tensor:
    """Depthwise convolution along the last axis that looks only back, then SiLU (or nothing: activation None).

    x: (batch, dim, L), taken as zero before its start. weight: (dim, width); its last column multiplies the current step.
    """
    if activation not in ("silu", None):
        raise ValueError(f"causal_conv1d: activation {activation!r} is not one of 'silu', None")
    if choose_backend(x.device, backend) == "mamba-ssm":
        kernel = _import_kernel("causal_conv1d", "causal_conv1d_cuda")
        return kernel.causal_conv1d_fn(x, weight, bias, activation=activation)
    with torch.autocast(x.device.type, enabled=False):
        y = _CausalConv.apply(x, weight.to(x.dtype))
        y = y if bias is None else y + bias.to(x.dtype)[:, None]
        return F.silu(y) if activation == "silu" else y


def _check_groups(dim: int, B: torch.Tensor, C: torch.Tensor) -> int:
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
    except Exception as error:  # these packages raise whatever their build left behind: ImportError, OSError, AttributeError
        raise ConfigError(
            f"the compiled Mamba kernel {compiled} cannot be imported ({type(error).__name__}: {error}); install mamba-ssm "
            "and causal-conv1d built for this PyTorch and CUDA (the CUDA image has them), run on the CPU, "
            "or set VMJEPA_SCAN=cpu to use the slow reference on the GPU"
        ) from error


def _scan_cpu(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    delta_softplus: bool,
    groups: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Brings the inputs into the layout of _ChunkedScan; what is not multiplied by n states is left to autograd."""
    dim, n = A.shape
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    y, last_state = _ChunkedScan.apply(
        _time_first(u, groups),
        _time_first(delta, groups),
        A.reshape(groups, dim // groups, n).transpose(1, 2).contiguous(),
        _state_weights(B, groups),
        _state_weights(C, groups),
    )
    out = y.permute(1, 2, 3, 0).flatten(1, 2)
    if D is not None:
        out = out + u * D[:, None]
    if z is not None:
        out = out * F.silu(z)
    return out, last_state.transpose(2, 3).reshape(u.shape[0], dim, n)


def _time_first(x: torch.Tensor, groups: int) -> torch.Tensor:
    """(batch, dim, L) -> (L, batch, G, dim/G) with the channels contiguous; a view where x's memory allows it."""
    x = x.unflatten(1, (groups, -1)).permute(3, 0, 1, 2)
    return x if x.stride(-1) == 1 else x.contiguous()


def _state_weights(x: torch.Tensor, groups: int) -> torch.Tensor:
    """B or C -> (L, batch, G, n, 1) when it varies in time, (1, 1, G, n, dim/G) when it is constant."""
    if x.dim() == 2:
        return x.unflatten(0, (groups, -1)).transpose(1, 2)[None, None].contiguous()
    if x.dim() == 3:
        x = x[:, None]
    return x.expand(-1, groups, -1, -1).permute(3, 0, 1, 2)[..., None].contiguous()


class _ChunkedScan(torch.autograd.Function):
    """The recurrence alone, on u, delta (L, b, G, d), A (G, n, d), B and C as _state_weights makes them.

    Returns y (L, b, G, d) and the last state (b, G, n, d). Time is cut into chunks; within one, everything but the
    recurrence itself is a handful of large operations, and each step is one fused multiply-add in place. Only the state at
    the start of each chunk is kept: the backward pass recomputes the others.
    """

    @staticmethod
    def forward(ctx: Any, u: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor) -> Any:
        length, batch, groups, dim = u.shape
        steps = _chunk_steps(length, batch * A.numel())
        decay, states = _buffers(u, A, steps)
        starts = u.new_zeros(math.ceil(length / steps), batch, *A.shape)
        state = u.new_zeros(batch, *A.shape)
        y = u.new_empty(length, batch, groups, dim)
        for k, t in enumerate(range(0, length, steps)):
            now = slice(t, min(t + steps, length))
            starts[k] = state
            _, h, _ = _run_chunk(u[now], delta[now], A, _at(B, now), state, decay, states)
            _weigh_states(_at(C, now), h[1:], out=y[now])
            state = h[-1].clone()
        ctx.steps = steps
        ctx.save_for_backward(u, delta, A, B, C, starts)
        return y, state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor, grad_last: torch.Tensor) -> Any:
        u, delta, A, B, C, starts = ctx.saved_tensors
        with torch.autocast(u.device.type, enabled=False):
            return _backward(u, delta, A, B, C, starts, ctx.steps, grad_y.contiguous(), grad_last)


def _backward(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    starts: torch.Tensor,
    steps: int,
    grad_y: torch.Tensor,
    grad_last: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Gradients of u, delta, A, B, C. With g_t the gradient of s_t: g_t = C_t dy_t + exp(delta_{t+1} A) g_{t+1}."""
    length = u.shape[0]
    decay, states = _buffers(u, A, steps)
    grads = torch.empty_like(decay)
    grad_u, grad_delta = torch.empty_like(grad_y), torch.empty_like(grad_y)
    grad_A, grad_B, grad_C = torch.zeros_like(A), torch.zeros_like(B), torch.zeros_like(C)
    carry = grad_last
    for k, t in reversed(list(enumerate(range(0, length, steps)))):
        now = slice(t, min(t + steps, length))
        b, c, dy, dt = _at(B, now), _at(C, now), grad_y[now], delta[now]
        a, h, x = _run_chunk(u[now], dt, A, b, starts[k], decay, states)
        g = torch.mul(c, dy[..., None, :], out=grads[: len(dy)])
        a_steps, g_steps = a.unbind(), g.unbind()
        g_steps[-1].add_(carry)
        for i in range(len(g_steps) - 2, -1, -1):
            g_steps[i].addcmul_(a_steps[i + 1], g_steps[i + 1])
        carry = a_steps[0] * g_steps[0]
        _add_weight_grad(_at(grad_C, now), h[1:], dy)
        _add_weight_grad(_at(grad_B, now), g, x)
        grad_x = _weigh_states(b, g, out=x.new_empty(x.shape))
        torch.mul(grad_x, dt, out=grad_u[now])
        by_decay = a.mul_(h[:-1]).mul_(g)  # gradient of delta_t A; the buffer of states is free from here on
        torch.mul(by_decay, A, out=h[1:])
        torch.sum(h[1:], -2, out=grad_delta[now]).addcmul_(grad_x, u[now])
        grad_A += by_decay.mul_(dt[..., None, :]).sum((0, 1))
    return grad_u, grad_delta, grad_A, grad_B, grad_C


def _chunk_steps(length: int, state_elements: int) -> int:
    return max(1, min(_MAX_CHUNK_STEPS, length, _CHUNK_ELEMENTS // state_elements))


def _buffers(u: torch.Tensor, A: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for a chunk's decays (steps, b, G, n, d) and states (steps + 1, ...), allocated once: fresh pages are slow."""
    shape = (u.shape[1], *A.shape)
    return u.new_empty(steps, *shape), u.new_empty(steps + 1, *shape)


def _run_chunk(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    start: torch.Tensor,
    decay: torch.Tensor,
    states: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Fills the buffers for one chunk. Returns decays exp(delta A), states (start first) and delta * u."""
    steps = len(u)
    # exp2 with the factor folded into A: several times faster than exp in PyTorch's CPU kernels
    decay = torch.mul(delta[..., None, :], A * math.log2(math.e), out=decay[:steps]).exp2_()
    x = delta * u
    states = states[: steps + 1]
    states[0] = start
    torch.mul(B, x[..., None, :], out=states[1:])
    previous = states[0]
    for a, state in zip(decay.unbind(), states[1:].unbind(), strict=True):
        previous = state.addcmul_(a, previous)
    return decay, states, x


def _at(x: torch.Tensor, now: slice) -> torch.Tensor:
    """The time steps `now` of B or C; all of it when it is constant in time."""
    return x[now] if x.shape[-1] == 1 else x


def _weigh_states(weights: torch.Tensor, states: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Sums states (T, b, G, n, d) over n with the weights of B or C, into out (T, b, G, d)."""
    if weights.shape[-1] == 1:
        n, dim = states.shape[-2:]
        torch.bmm(weights.reshape(-1, 1, n), states.reshape(-1, n, dim), out=out.view(-1, 1, dim))
        return out
    return torch.sum(weights * states, -2, out=out)


def _add_weight_grad(grad: torch.Tensor, states: torch.Tensor, x: torch.Tensor) -> None:
    """Adds the gradient of B or C: states (T, b, G, n, d) against x (T, b, G, d)."""
    if grad.shape[-1] == 1:
        n, dim = states.shape[-2:]
        grad += torch.bmm(states.reshape(-1, n, dim), x.reshape(-1, dim, 1)).view_as(grad)
    else:
        grad += (states * x[..., None, :]).sum((0, 1))


class _CausalConv(torch.autograd.Function):
    """Depthwise causal convolution as `width` shifted multiply-adds: for 4 taps faster than the general convolution."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        x = _time_first(x, 1)[:, :, 0]  # (L, b, dim)
        ctx.save_for_backward(x, weight)
        y = x * weight[:, -1]
        for back in range(1, min(weight.shape[1], len(x))):
            y[back:].addcmul_(x[:-back], weight[:, -1 - back])
        return y.permute(1, 2, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight = ctx.saved_tensors
        grad = _time_first(grad, 1)[:, :, 0]
        grad_x = grad * weight[:, -1]
        grad_weight = torch.zeros_like(weight)
        grad_weight[:, -1] = (grad * x).sum((0, 1))
        for back in range(1, min(weight.shape[1], len(x))):
            grad_x[:-back].addcmul_(grad[back:], weight[:, -1 - back])
            grad_weight[:, -1 - back] = (grad[back:] * x[:-back]).sum((0, 1))
        return grad_x.permute(1, 2, 0), grad_weight
