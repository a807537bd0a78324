"""Which sample comes when: an infinite stream of sample ids that is a pure function of the seed.

Nothing here has state that must be saved. Element p of the stream belongs to epoch p // n, each epoch is a permutation
of all n samples, and a rank or a resumed run asks for the positions it needs. The random numbers are raw Philox bits
keyed by (seed, stream) with the counter (epoch, …): they do not depend on numpy's sampling algorithms, which may
change between releases.
"""

from __future__ import annotations

import numpy as np

from vmjepa.errors import DataError

ORDER_STREAM, CLIP_STREAM = 1, 2  # one Philox key per use, so that no two uses share random bits


def random_bits(seed: int, stream: int, counter: tuple[int, int, int], size: int) -> np.ndarray:
    """`size` uint64 random words that depend on nothing but the arguments (Philox4x64, Salmon et al. 2011).

    `counter` addresses an independent block of words, e.g. (epoch, sample, attempt).
    """
    words = 2**64 - 1
    key = np.array([seed & words, stream], dtype=np.uint64)
    return np.random.Philox(key=key, counter=np.array([0, *counter], dtype=np.uint64)).random_raw(size)


class Order:
    """The order of samples over all epochs, shuffled so that reads stay near each other.

    In every epoch the groups (shards) are shuffled, cut into windows of `window_groups` groups, and the samples are
    shuffled inside each window. At most one window of shards is therefore in use at a time (two at its border).

    Args:
        group_of_sample: (n,) integer group of each sample.
        seed: seed of the run.
        window_groups: groups per shuffle window; a window that holds all groups shuffles freely.
        shuffle: False gives the samples in their stored order in every epoch.

    Raises:
        DataError: there is no sample.
    """

    def __init__(self, group_of_sample: np.ndarray, seed: int, window_groups: int, shuffle: bool = True) -> None:
        if len(group_of_sample) == 0:
            raise DataError("the training data holds no clip: check the dataset paths and data.filter_short_videos")
        self._groups, self._group_of_sample = np.unique(group_of_sample, return_inverse=True)
        self._seed = seed
        self._window_groups = max(1, window_groups)
        self._shuffle = shuffle
        self._recent: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self._group_of_sample)

    def ids(self, start: int, count: int) -> np.ndarray:
        """Sample ids at stream positions start … start + count - 1, as int64 (count,)."""
        positions = np.arange(start, start + count, dtype=np.int64)
        epochs, places = np.divmod(positions, len(self))
        result = np.empty(count, dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            result[here] = self._permutation(int(epoch))[places[here]]
        return result

    def epochs(self, start: int, count: int) -> np.ndarray:
        """Epoch of each of those positions, as int64 (count,)."""
        return np.arange(start, start + count, dtype=np.int64) // len(self)

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._recent:
            if len(self._recent) == 2:  # a batch spans at most this epoch and the next, unless the dataset is tiny
                self._recent.pop(min(self._recent))
            self._recent[epoch] = self._permute(epoch)
        return self._recent[epoch]

    def _permute(self, epoch: int) -> np.ndarray:
        n, groups = len(self), len(self._groups)
        if not self._shuffle:
            return np.arange(n, dtype=np.int64)
        bits = random_bits(self._seed, ORDER_STREAM, (epoch, 0, 0), groups + n)
        place_of_group = np.empty(groups, dtype=np.int64)
        place_of_group[np.argsort(bits[:groups], kind="stable")] = np.arange(groups)
        window = (place_of_group // self._window_groups)[self._group_of_sample]
        return np.lexsort((bits[groups:], window)).astype(np.int64, copy=False)
