"""Batches of mixed lengths: padding must change nothing, to fp64 rounding, in outputs and gradients.

Each network runs once on the padded batch and once per clip on its real tokens alone. Lengths include a single token.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from vmjepa.masks import TokenSet
from vmjepa.models.mixer import BiMamba
from vmjepa.models.predictor import AttentionPredictor, MambaPredictor
from vmjepa.models.videomamba import VideoMamba
from vmjepa.models.vit import VisionTransformer

TOLERANCE = 1e-12
GRID, DIM = (2, 3, 3), 24
CONTEXT_LENGTHS, TARGET_LENGTHS = (1, 7, 4), (9, 2, 5)

ENCODERS: dict[str, Callable[[], nn.Module]] = {
    "videomamba": lambda: VideoMamba(24, 8, 4, 2, DIM, depth=3, d_state=4),
    "vit": lambda: VisionTransformer(24, 8, 4, 2, DIM, depth=2, num_heads=3),
}
PREDICTORS: dict[str, Callable[[], nn.Module]] = {
    "attention": lambda: AttentionPredictor(GRID, DIM, 16, depth=2, num_heads=2),
    "mamba": lambda: MambaPredictor(GRID, DIM, 16, depth=3, d_state=4),
}


def _noisy(make: Callable[[], nn.Module]) -> nn.Module:
    """The network in fp64 with noise on every parameter, so that no zero hides a path."""
    torch.manual_seed(0)
    module = make().double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return module


def _token_sets(lengths: tuple[int, ...], seed: int) -> TokenSet:
    """Random ascending tokens, padded with index 0 at the end of each row."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, length in zip(index, lengths, strict=True):
        row[:length] = torch.randperm(18, generator=generator)[:length].sort().values
    return TokenSet(index, torch.tensor(lengths))


def _alone(tokens: TokenSet, b: int) -> TokenSet:
    assert tokens.lengths is not None
    return TokenSet(tokens.index[b : b + 1, : int(tokens.lengths[b])])


def _assert_same(padded: list[Tensor], alone: list[Tensor]) -> None:
    for p, a in zip(padded, alone, strict=True):
        torch.testing.assert_close(p, a, rtol=TOLERANCE, atol=TOLERANCE)


def _gradients(module: nn.Module, loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    parameters = [p for p in module.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, [*parameters, *inputs], allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(grads, [*parameters, *inputs], strict=True)]


@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_padded_equals_alone(name: str) -> None:
    encoder = _noisy(ENCODERS[name])
    clips = torch.randn(3, 3, 4, 24, 24, dtype=torch.float64).requires_grad_()
    context = _token_sets(CONTEXT_LENGTHS, seed=1)
    weights = [torch.randn(length, DIM, dtype=torch.float64) for length in CONTEXT_LENGTHS]
    together = encoder(clips, context)
    padded = [row[:length] for row, length in zip(together, CONTEXT_LENGTHS, strict=True)]
    alone = [encoder(clips[b : b + 1], _alone(context, b))[0] for b in range(3)]
    _assert_same(padded, alone)
    losses = [sum((out * w).sum() for out, w in zip(outs, weights, strict=True)) for outs in (padded, alone)]
    _assert_same(*(_gradients(encoder, loss, clips) for loss in losses))


@pytest.mark.parametrize("name", PREDICTORS)
def test_predictor_padded_equals_alone(name: str) -> None:
    predictor = _noisy(PREDICTORS[name])
    context, target = _token_sets(CONTEXT_LENGTHS, seed=1), _token_sets(TARGET_LENGTHS, seed=2)
    features = torch.randn(3, max(CONTEXT_LENGTHS), DIM, dtype=torch.float64).requires_grad_()
    weights = [torch.randn(length, DIM, dtype=torch.float64) for length in TARGET_LENGTHS]
    together = predictor(features, context, target, 1)
    padded = [row[:length] for row, length in zip(together, TARGET_LENGTHS, strict=True)]
    alone = [
        predictor(features[b : b + 1, : CONTEXT_LENGTHS[b]], _alone(context, b), _alone(target, b), 1)[0]
        for b in range(3)
    ]
    _assert_same(padded, alone)
    losses = [sum((out * w).sum() for out, w in zip(outs, weights, strict=True)) for outs in (padded, alone)]
    _assert_same(*(_gradients(predictor, loss, features) for loss in losses))


@pytest.mark.parametrize("name", PREDICTORS)
def test_only_one_set_is_padded(name: str) -> None:
    """Contexts of one length (lengths None) beside targets of mixed lengths."""
    predictor = _noisy(PREDICTORS[name])
    context, target = TokenSet(_token_sets((4, 4, 4), seed=1).index), _token_sets(TARGET_LENGTHS, seed=2)
    features = torch.randn(3, 4, DIM, dtype=torch.float64)
    together = predictor(features, context, target, 0)
    for b, length in enumerate(TARGET_LENGTHS):
        alone = predictor(features[b : b + 1], TokenSet(context.index[b : b + 1]), _alone(target, b), 0)
        _assert_same([together[b, :length]], [alone[0]])


def test_mixer_ignores_what_stands_in_the_padding() -> None:
    mixer = _noisy(lambda: BiMamba(DIM, d_state=4))
    u = torch.randn(3, 7, DIM, dtype=torch.float64)
    lengths = torch.tensor(CONTEXT_LENGTHS)
    real = torch.arange(7) < lengths[:, None]
    other = torch.where(real[..., None], u, 1e3 * torch.randn_like(u))
    assert torch.equal(mixer(u, lengths)[real], mixer(other, lengths)[real])
    assert not torch.allclose(mixer(u)[real], mixer(other)[real]), "without lengths the padding is seen"


@pytest.mark.parametrize("name", ENCODERS)
def test_permuting_the_batch_permutes_the_outputs(name: str) -> None:
    """A gather that reads the first clip's tokens for every row would pass many other tests."""
    encoder = _noisy(ENCODERS[name])
    clips, order = torch.randn(3, 3, 4, 24, 24, dtype=torch.float64), torch.tensor([2, 0, 1])
    context = _token_sets((5, 5, 5), seed=3)
    out = encoder(clips, context)
    permuted = encoder(clips[order], TokenSet(context.index[order], context.lengths))
    _assert_same([permuted], [out[order]])
    assert not torch.allclose(encoder(clips[order], context), out), "clips matter, not only masks"


@pytest.mark.parametrize("name", ["videomamba", "vit"])
def test_all_tokens_as_a_context_equal_no_context(name: str) -> None:
    encoder = _noisy(ENCODERS[name])
    clips = torch.randn(2, 3, 4, 24, 24, dtype=torch.float64)
    every = TokenSet(torch.arange(18).expand(2, -1), torch.tensor([18, 18]))
    _assert_same([encoder(clips, every)], [encoder(clips)])
