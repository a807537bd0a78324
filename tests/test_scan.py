"""The selective scan and the convolution against plain loops, chunk borders, dtypes, and the choice of backend."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vmjepa.errors import ConfigError
from vmjepa.models import scan
from vmjepa.models.scan import causal_conv1d, choose_backend, selective_scan


def _loop(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """The definition, one step at a time; B and C (batch, G, n, L)."""
    per_group = u.shape[1] // B.shape[1]
    B, C = B.repeat_interleave(per_group, dim=1), C.repeat_interleave(per_group, dim=1)
    delta, state, out = F.softplus(delta), u.new_zeros(*u.shape[:2], A.shape[1]), []
    for t in range(u.shape[2]):
        step = delta[:, :, t, None]
        state = torch.exp(step * A) * state + step * B[..., t] * u[:, :, t, None]
        out.append((state * C[..., t]).sum(-1) + D * u[:, :, t])
    return torch.stack(out, dim=-1)


def _inputs(
    batch: int, dim: int, groups: int, n: int, length: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    shapes = [(batch, dim, length)] * 2 + [(dim, n), (batch, groups, n, length), (batch, groups, n, length), (dim,)]
    u, delta, A, B, C, D = (torch.randn(shape, dtype=dtype) for shape in shapes)
    return tuple(v.requires_grad_() for v in (u, delta, -A.exp(), B, C, D))


def _out_and_grads(inputs: tuple[Tensor, ...], out: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    return [out, *torch.autograd.grad((out * torch.randn(out.shape, dtype=out.dtype)).sum(), inputs)]


@pytest.mark.parametrize(
    ("batch", "groups", "length"),
    [(1, 1, 1), (2, 2, 7), (5, 2, 13), (3, 1, 16)],
    ids=["one step", "two groups", "uneven cuts", "whole chunks"],
)
def test_equals_the_loop_across_chunks(monkeypatch: pytest.MonkeyPatch, batch: int, groups: int, length: int) -> None:
    """Small blocks, so that batch and time are cut in several places."""
    monkeypatch.setattr(scan, "_STEP_ELEMENTS", 2 * 6 * 4)
    monkeypatch.setattr(scan, "_CHUNK_ELEMENTS", 4 * 2 * 6 * 4)
    inputs = _inputs(batch, 6, groups, 4, length)
    u, delta, A, B, C, D = inputs
    ours = _out_and_grads(inputs, selective_scan(u, delta, A, B, C, D, delta_softplus=True))
    for actual, expected in zip(ours, _out_and_grads(inputs, _loop(*inputs)), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


def test_gradient_through_the_last_state() -> None:
    inputs = _inputs(2, 4, 2, 3, 9)

    def last(*tensors: Tensor) -> Tensor:
        return selective_scan(*tensors, delta_softplus=True, return_last_state=True)[1]

    assert torch.autograd.gradcheck(last, inputs)


def test_memory_layout_does_not_matter() -> None:
    """A channels-last view gives the same numbers as the contiguous tensor."""
    u, delta, A, B, C, D = _inputs(2, 6, 2, 4, 11)
    expected = selective_scan(u, delta, A, B, C, D)
    views = [v.transpose(1, 2).contiguous().transpose(1, 2) for v in (u, delta)]
    assert torch.equal(selective_scan(*views, A, B, C, D), expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)], ids=["fp32", "bf16"])
def test_narrow_types_stay_near_fp64(dtype: torch.dtype, tolerance: float) -> None:
    wide = _inputs(2, 6, 2, 4, 50)
    u, delta, A, B, C, D = wide
    narrow = [v.detach().to(dtype) for v in (u, delta)]
    out = selective_scan(*narrow, A.float(), B.to(dtype), C.to(dtype), D.float(), delta_softplus=True)
    reference = selective_scan(u, delta, A, B, C, D, delta_softplus=True)
    assert out.dtype == dtype
    assert (out - reference).abs().max() <= tolerance * reference.abs().max()


def test_autocast_does_not_reach_the_scan() -> None:
    inputs = _inputs(2, 6, 2, 4, 20, torch.float32)
    expected = _out_and_grads(inputs, selective_scan(*inputs, delta_softplus=True))
    with torch.autocast("cpu", torch.bfloat16):
        actual = _out_and_grads(inputs, selective_scan(*inputs, delta_softplus=True))
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


def test_skipped_steps_leave_the_state() -> None:
    """A pre-softplus delta of -1e4 changes nothing, bit for bit, whatever u, B and C are there."""
    u, delta, A, B, C, D = _inputs(1, 4, 1, 3, 6)
    skip = torch.cat([delta[..., :4], torch.full_like(delta[..., 4:], -1e4)], dim=-1)
    bias = torch.full((4,), 3.0, dtype=torch.float64)
    _, padded = selective_scan(u, skip, A, B, C, D, None, bias, True, True)
    _, short = selective_scan(u[..., :4], delta[..., :4], A, B[..., :4], C[..., :4], D, None, bias, True, True)
    assert torch.equal(padded, short)


@pytest.mark.parametrize("length", [1, 2, 9])
@pytest.mark.parametrize("activation", ["silu", None], ids=["silu", "linear"])
def test_conv_equals_torch(length: int, activation: str | None) -> None:
    torch.manual_seed(0)
    shapes = [(2, 6, length), (6, 4), (6,)]
    inputs = tuple(torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes)
    x, weight, bias = inputs
    reference = F.conv1d(F.pad(x, (3, 0)), weight[:, None], bias, groups=6)
    reference = F.silu(reference) if activation else reference
    ours = _out_and_grads(inputs, causal_conv1d(x, weight, bias, activation))
    for actual, expected in zip(ours, _out_and_grads(inputs, reference), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_groups_that_do_not_divide_the_channels() -> None:
    u, delta, A, B, C, D = _inputs(1, 6, 4, 2, 3)
    with pytest.raises(ValueError, match="6 channels cannot be shared by groups"):
        selective_scan(u, delta, A, B, C, D)


def test_backend_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VMJEPA_SCAN", raising=False)
    assert choose_backend(torch.device("cpu")) == "cpu"
    monkeypatch.setenv("VMJEPA_SCAN", "cpu")
    assert choose_backend(torch.device("cuda")) == "cpu"
    monkeypatch.setenv("VMJEPA_SCAN", "cuda")
    with pytest.raises(ConfigError, match="unknown; use one of cpu, mamba-ssm"):
        choose_backend(torch.device("cpu"))
    monkeypatch.setenv("VMJEPA_SCAN", "mamba-ssm")
    with pytest.raises(ConfigError, match="needs CUDA tensors"):
        choose_backend(torch.device("cpu"))


def test_cuda_without_kernels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VMJEPA_SCAN", raising=False)
    monkeypatch.setitem(__import__("sys").modules, "selective_scan_cuda", None)
    with pytest.raises(ConfigError, match=r"selective_scan_cuda cannot be imported .*install mamba-ssm"):
        choose_backend(torch.device("cuda"))


def test_kernels_get_what_they_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA branch with stand-ins for the kernels: arguments in the packages' order, x contiguous."""
    calls: dict[str, tuple[object, ...]] = {}
    kernels = SimpleNamespace(
        selective_scan_fn=lambda *args: calls.update(scan=args) or args[0],
        causal_conv1d_fn=lambda *args, activation: calls.update(conv=(*args, activation)) or args[0],
    )
    monkeypatch.setattr(scan, "choose_backend", lambda device, backend: "mamba-ssm")
    monkeypatch.setattr(scan, "_import_kernel", lambda module, compiled: kernels)
    u, delta, A, B, C, D = _inputs(2, 6, 2, 4, 5)
    bias = torch.zeros(6)
    selective_scan(u, delta, A, B, C, D, None, bias, True, False)
    assert [id(arg) for arg in calls["scan"][:8]] == [id(arg) for arg in (u, delta, A, B, C, D, None, bias)]
    assert calls["scan"][8:] == (True, False)
    x = torch.randn(2, 5, 6).transpose(1, 2)
    causal_conv1d(x, D, bias, "silu")
    assert calls["conv"][0].is_contiguous()
    assert calls["conv"][3] == "silu"
