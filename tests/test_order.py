"""The order of samples: permutations, independence of the number of ranks, resume, and reads that stay near."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmjepa.data.order import ORDER_STREAM, Order, random_bits
from vmjepa.errors import DataError

groups = st.lists(st.integers(0, 6), min_size=1, max_size=60).map(np.array)
seeds = st.integers(0, 2**63)


@given(groups, seeds, st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_every_epoch_is_a_permutation(group, seed, window):
    order = Order(group, seed, window)
    n = len(group)
    for epoch in range(3):
        assert sorted(order.ids(epoch * n, n)) == list(range(n))
        assert set(order.epochs(epoch * n, n)) == {epoch}


@given(groups, seeds, st.integers(1, 8), st.integers(0, 300), st.integers(1, 200))
@settings(max_examples=60, deadline=None)
def test_any_slice_equals_the_unbroken_stream(group, seed, window, start, count):
    """Resume: a fresh object asked for a late slice gives what one object read from the beginning gives."""
    unbroken = Order(group, seed, window)
    whole = np.concatenate([unbroken.ids(p, 1) for p in range(start + count)])
    np.testing.assert_array_equal(Order(group, seed, window).ids(start, count), whole[start:])


def test_epochs_and_seeds_differ():
    order = Order(np.zeros(100, int), seed=1, window_groups=1)
    assert (order.ids(0, 100) != order.ids(100, 100)).any()
    assert (order.ids(0, 100) != Order(np.zeros(100, int), 2, 1).ids(0, 100)).any()


def test_single_group_is_shuffled_freely_and_uniformly():
    """A CSV is one group: over many epochs each sample's mean place is the middle (standard error 0.58 places)."""
    order = Order(np.zeros(20, int), seed=3, window_groups=16)
    places = np.argsort(order.ids(0, 20 * 2000).reshape(2000, 20), axis=1)
    assert abs(places.mean(0) - 9.5).max() < 0.6
    assert abs(np.corrcoef(places.T)[np.triu_indices(20, 1)]).max() < 0.15


@pytest.mark.parametrize("window", [1, 3, 16])
def test_samples_of_a_window_stay_together(window):
    """50 shards of 20 clips: at any time the clips come from at most `window` shards, and every shard is read once."""
    group = np.repeat(np.arange(50), 20)
    shards = group[Order(group, seed=0, window_groups=window).ids(0, 1000)]
    for start in range(0, 1000, 20 * window):
        assert len(set(shards[start : start + 20 * window])) <= window
    first, last = (np.array([np.flatnonzero(shards == s)[i] for s in range(50)]) for i in (0, -1))
    assert (last - first < 20 * window).all()
    assert list(first) != sorted(first), "the shards themselves must be shuffled"


def test_without_shuffle_the_stored_order_repeats():
    np.testing.assert_array_equal(Order(np.array([1, 0, 1]), 0, 1, shuffle=False).ids(1, 6), [1, 2, 0, 1, 2, 0])


def test_a_batch_may_be_larger_than_the_dataset():
    ids = Order(np.zeros(3, int), 0, 1).ids(0, 30)
    assert (np.sort(ids.reshape(10, 3), axis=1) == [0, 1, 2]).all()


def test_only_two_permutations_are_kept():
    order = Order(np.zeros(10, int), 0, 1)
    order.ids(0, 500)
    assert len(order._recent) == 2


def test_no_sample_is_an_error():
    with pytest.raises(DataError, match="no clip"):
        Order(np.array([], int), 0, 1)


def philox4x64(counter, key, rounds=10):
    """Philox4x64-10 as Salmon et al. (2011) define it."""
    c, k, word = list(counter), list(key), 2**64 - 1
    for _ in range(rounds):
        a, b = c[0] * 0xD2E7470EE14C6C93, c[2] * 0xCA5A826395121157
        c = [(b >> 64) ^ c[1] ^ k[0], b & word, (a >> 64) ^ c[3] ^ k[1], a & word]
        k = [(k[0] + 0x9E3779B97F4A7C15) & word, (k[1] + 0xBB67AE8584CAA73B) & word]
    return c


def test_random_bits_are_those_of_the_paper():
    """Against the paper's definition (numpy numbers the first block 1): other bits would break running jobs' resume."""
    expected = philox4x64([1, 5, 6, 7], [42, ORDER_STREAM]) + philox4x64([2, 5, 6, 7], [42, ORDER_STREAM])
    assert random_bits(42, ORDER_STREAM, (5, 6, 7), 8).tolist() == expected


def test_a_million_samples_are_cheap():
    group = np.repeat(np.arange(1000), 1000)
    order = Order(group, 0, 16)
    assert len(set(order.ids(5_000_000, 1024).tolist())) == 1024
