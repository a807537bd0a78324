"""Mask properties that hold for any grid, batch and truncation."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmjepa.errors import ConfigError
from vmjepa.masks import draw_mask


def spec(blocks: int = 8, spatial: float = 0.15, temporal: float = 1.0, keep: int | None = None, time: float = 1.0):
    return SimpleNamespace(
        aspect_ratio=(0.75, 1.5), num_blocks=blocks, spatial_scale=(spatial, spatial),
        temporal_scale=(temporal, temporal), max_temporal_keep=time, max_keep=keep,
    )  # fmt: skip


grids = st.tuples(st.integers(1, 6), st.integers(4, 9), st.integers(4, 9))


@settings(max_examples=60, deadline=None)
@given(grids, st.integers(1, 6), st.integers(0, 10**6), st.sampled_from(["none", "prefix", "random"]))
def test_context_and_target_are_disjoint_and_ascending(grid, samples, step, truncate):
    mask = draw_mask(spec(), grid, samples, 3, step, 0, truncate)
    assert not (mask.context & mask.target).any()
    assert mask.context.any(axis=1).all()
    assert mask.target.any(axis=1).all()
    if truncate == "none":
        assert (mask.context | mask.target).all()
    else:
        assert len(set(mask.context.sum(axis=1))) == 1
        assert len(set(mask.target.sum(axis=1))) == 1
    part = mask.rows(np.arange(samples))
    for tokens, cells in ((part.context, mask.context), (part.target, mask.target)):
        for row in range(samples):
            length = tokens.index.shape[1] if tokens.lengths is None else int(tokens.lengths[row])
            np.testing.assert_array_equal(tokens.index[row, :length].numpy(), np.flatnonzero(cells[row]))
            assert (tokens.index[row, length:] == 0).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**63 - 1), st.integers(0, 10**9), st.integers(0, 3))
def test_masks_are_a_pure_function_of_seed_step_and_number(seed, step, number):
    first, again = (draw_mask(spec(), (4, 6, 6), 5, seed, step, number, "random") for _ in range(2))
    np.testing.assert_array_equal(first.context, again.context)
    np.testing.assert_array_equal(first.target, again.target)
    other = draw_mask(spec(), (4, 6, 6), 5, seed, step + 1, number, "random")
    assert not np.array_equal(other.context, first.context)


def test_prefix_loses_the_end_and_random_does_not():
    """The defect of the official cut: late time steps vanish from the context."""
    share = {}
    for truncate in ("prefix", "random"):
        drawn = [draw_mask(spec(), (8, 14, 14), 24, 0, step, 0, truncate).context for step in range(20)]
        share[truncate] = np.mean(drawn, axis=(0, 1)).reshape(8, -1).mean(axis=1)
    assert share["prefix"][-1] < 0.2 * share["prefix"][0]
    assert share["random"][-1] > 0.8 * share["random"][0]


def test_max_keep_and_max_temporal_keep_limit_the_context():
    mask = draw_mask(spec(keep=5), (4, 8, 8), 6, 0, 0, 0, "none")
    assert mask.context.sum(axis=1).max() <= 5
    mask = draw_mask(spec(time=0.5), (4, 8, 8), 6, 0, 0, 0, "none")
    assert not mask.context.reshape(6, 4, -1)[:, 2:].any()
    assert mask.target.reshape(6, 4, -1)[:, 2:].all()


def test_blocks_that_cover_the_grid_are_refused_not_redrawn_for_ever():
    with pytest.raises(ConfigError, match=r"mask\.1.*cover the whole"):
        draw_mask(spec(blocks=2, spatial=1.0), (2, 4, 4), 3, 0, 0, 1, "none")


@pytest.mark.parametrize("spatial", [0.01, 0.03], ids=str)
def test_a_block_has_at_least_one_token(spatial):
    """Else there would be nothing to predict and the loss 0 / 0."""
    mask = draw_mask(spec(blocks=1, spatial=spatial), (2, 6, 6), 4, 0, 0, 0, "none")
    assert mask.target.any(axis=1).all()


def test_a_grid_of_one_token_is_refused():
    with pytest.raises(ConfigError, match="no context is left"):
        draw_mask(spec(), (1, 1, 1), 2, 0, 0, 0, "none")
