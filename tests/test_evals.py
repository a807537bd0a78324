"""Frozen probes: exact counting, the training loop, standardisation, reports; then a whole evaluation on shards."""

from __future__ import annotations

import copy
import itertools
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vmjepa.data.order import Order
from vmjepa.evals import probe_loop
from vmjepa.evals.probe_loop import EpochResult, Head, TokenBatch, adamw, count_correct, train_probes
from vmjepa.evals.report import Chance, ProbeResult, as_json, from_json, standard_error, summarize, verdicts
from vmjepa.evals.sources import CachedTrain, CachedValidation
from vmjepa.train.distributed import World
from vmjepa.train.schedules import Schedule

ALONE = World(0, 1, torch.device("cpu"))
CLASSES = 3


class MeanProbe(nn.Module):
    """Linear on the mean token: enough to test the loop."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.linear(tokens.mean(1))


def schedule(epochs: int, steps: int) -> Schedule:
    return Schedule(steps, epochs, 0.0, 1.0, 0.05, 0.05, 0.0, 0.0, 0.0, (1.0, 1.0))


def token_set(videos: int, looks: int = 2, draws: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens (draws, videos, looks, 5, 8) whose mean over dims 0-2 tells the label, under noise; labels (videos,)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(videos) % CLASSES
    tokens = torch.randn(draws, videos, looks, 5, 8, generator=generator)
    tokens[..., :CLASSES] += 1.0 * torch.eye(CLASSES)[labels][None, :, None, None]
    return tokens, labels


def heads(count: int = 1, seeds: Sequence[int] = (0,)) -> list[Head]:
    made = []
    for arm in range(count):
        for seed in seeds:
            torch.manual_seed(seed)
            probe = MeanProbe(8)
            made.append(Head(arm, "linear", seed, probe, adamw(probe, 0.01)))
    return made


def train_source(tokens: Sequence[Tensor], labels: Tensor, batch: int, accumulation: int = 1, world: World = ALONE):
    order = Order(np.zeros(len(labels), np.int64), seed=3, window_groups=1)
    return CachedTrain(tokens, labels.expand(len(tokens[0]), -1), order, batch, accumulation, world, replaced=3)


def train(
    made: list[Head], epochs: int = 6, batch: int = 10, accumulation: int = 1, world: World = ALONE, draws: int = 1
):
    tokens, labels = token_set(60, draws=draws)
    validation, validation_labels = token_set(31, seed=1)
    source = train_source([tokens] * 2, labels, batch, accumulation, world)
    mine = slice(world.rank, None, world.size)
    results: list[EpochResult] = []
    train_probes(
        made,
        source,
        CachedValidation([validation[0, mine]] * 2, validation_labels[mine], 7, world),
        schedule(epochs, source.steps_per_epoch),
        world,
        bfloat16=False,
        first_epoch=0,
        on_epoch=results.append,
    )
    return results


class FixedLogits(nn.Module):
    """A probe whose logits are the first token."""

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens[:, 0]


class OneBatch:
    def __init__(self, batch: TokenBatch) -> None:
        self.batch = batch

    def batches(self) -> Iterator[TokenBatch]:
        yield self.batch


def test_views_are_averaged_as_probabilities() -> None:
    """Three looks whose mean logits say class 0 and whose mean probabilities say class 1, which is what counts."""
    logits = torch.tensor([[[20.0, 0.0, 0.0], [0.0, 6.0, 0.0], [0.0, 6.0, 0.0]]])
    assert int(logits.mean(1).argmax()) == 0
    head = Head(0, "linear", 0, FixedLogits(), torch.optim.SGD([torch.zeros(1)], 0.1))
    batch = TokenBatch([logits[:, :, None]], torch.tensor([1]))
    assert count_correct([head], OneBatch(batch), ALONE, bfloat16=False) == ([1], 1)


def test_every_validation_video_counts_once() -> None:
    """31 videos in batches of 7: the total is 31, and the count equals a plain loop over the videos."""
    tokens, labels = token_set(31, seed=1)
    (head,) = heads()
    correct, total = count_correct([head], CachedValidation([tokens[0]], labels, 7, ALONE), ALONE, bfloat16=False)
    with torch.no_grad():
        expected = sum(
            int(head.probe(tokens[0, i]).softmax(-1).mean(0).argmax() == labels[i]) for i in range(len(labels))
        )
    assert (correct, total) == ([expected], 31)


def test_probe_learns_and_arms_do_not_mix() -> None:
    """Arm 0 carries the label, arm 1 only noise: the first head learns, the second stays near chance."""
    tokens, labels = token_set(90)
    noise = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(5))
    validation, validation_labels = token_set(300, seed=1)
    noise_too = torch.randn(validation.shape, generator=torch.Generator().manual_seed(6))
    source = train_source([tokens, noise], labels, 15)
    results: list[EpochResult] = []
    checked = CachedValidation([validation[0], noise_too[0]], validation_labels, 50, ALONE)
    train_probes(heads(2), source, checked, schedule(10, source.steps_per_epoch), ALONE, False, 0, results.append)
    last = results[-1]
    assert [result.epoch for result in results] == list(range(10))
    assert last.total == 300
    assert last.correct[0] > 0.9 * 300
    assert last.correct[1] < 0.5 * 300
    assert last.train_loss[0] < 0.5 * results[0].train_loss[0]


def test_training_is_deterministic_and_seeds_differ() -> None:
    once, again = heads(seeds=(0, 1)), heads(seeds=(0, 1))
    assert train(once) == train(again)
    weights = [head.probe.linear.weight for head in once]
    assert torch.equal(weights[0], again[0].probe.linear.weight)
    assert not torch.equal(weights[0], weights[1])


def test_resumed_training_equals_unbroken_training() -> None:
    """Three epochs, state carried over, three more, against six: bit-identical weights."""
    whole = heads()
    train(whole, epochs=6)
    (part,) = heads()
    tokens, labels = token_set(60)
    validation, validation_labels = token_set(31, seed=1)
    source = train_source([tokens], labels, 10)
    checked = CachedValidation([validation[0]], validation_labels, 7, ALONE)
    plan = schedule(6, source.steps_per_epoch)

    class Stopped(Exception):
        pass

    def stop(result: EpochResult) -> None:
        if result.epoch == 2:
            raise Stopped

    with pytest.raises(Stopped):
        train_probes([part], source, checked, plan, ALONE, False, 0, stop)
    (resumed,) = heads(seeds=(9,))
    resumed.probe.load_state_dict(copy.deepcopy(part.probe.state_dict()))
    resumed.optimizer.load_state_dict(copy.deepcopy(part.optimizer.state_dict()))
    train_probes([resumed], source, checked, plan, ALONE, False, 3, lambda result: None)
    assert torch.equal(resumed.probe.linear.weight, whole[0].probe.linear.weight)


def test_accumulated_micro_batches_equal_one_batch() -> None:
    """Batch 12 against 3 micro-batches of 4: the same weights to rounding."""
    whole, parts = heads(), heads()
    train(whole, batch=12)
    train(parts, batch=4, accumulation=3)
    torch.testing.assert_close(whole[0].probe.linear.weight, parts[0].probe.linear.weight, rtol=1e-5, atol=1e-6)


class ThreadRanks:
    """Ranks as threads: `sum_over_ranks` adds what all of them bring."""

    def __init__(self, size: int) -> None:
        self.size, self.local = size, threading.local()
        self._barrier, self._slots = threading.Barrier(size, timeout=60), [torch.zeros(0)] * size

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        self._slots[self.local.rank] = values
        self._barrier.wait()
        total = torch.stack(self._slots).sum(0)
        self._barrier.wait()
        return total

    def run(self, work: Callable[[World], Any]) -> list[Any]:
        def rank(number: int) -> Any:
            self.local.rank = number
            return work(World(number, self.size, torch.device("cpu")))

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(rank, range(self.size)))


def test_two_ranks_equal_one(monkeypatch) -> None:
    """The same global batch on one and on two ranks: equal weights to rounding, and the same counts."""
    ranks = ThreadRanks(2)
    monkeypatch.setattr(probe_loop, "sum_over_ranks", ranks.sum_over_ranks)

    parts = [heads(), heads()]  # made here: the seed is the process's
    results = ranks.run(lambda world: train(parts[world.rank], batch=6, world=world)[-1])
    whole = heads()
    expected = train(whole, batch=12)[-1]
    for part, result in zip(parts, results, strict=True):
        torch.testing.assert_close(part[0].probe.linear.weight, whole[0].probe.linear.weight, rtol=1e-5, atol=1e-6)
        assert (result.correct, result.total) == (expected.correct, expected.total)
        assert result.train_accuracy == expected.train_accuracy
        assert result.replaced == expected.replaced == 3  # both ranks hold the same clips
        assert result.train_loss == pytest.approx(expected.train_loss, rel=1e-5)


def test_draws_take_turns() -> None:
    """With two draws, epoch e uses draw e mod 2 of every video."""
    tokens, labels = token_set(6, looks=1, draws=2)
    tokens[0], tokens[1] = 0.0, 1.0
    source = train_source([tokens], labels, 3)
    seen = [float(batch.tokens[0].mean()) for batches in itertools.islice(source.steps(0), 8) for batch in batches]
    assert seen == [0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0]


def outcomes(pretrained: Sequence[int], random: Sequence[int], total: int = 200) -> list[ProbeResult]:
    return [
        ProbeResult(encoder, False, "attentive", seed, correct, total, 1.0)
        for encoder, counts in (("pretrained", pretrained), ("random", random))
        for seed, correct in enumerate(counts)
    ]


@pytest.mark.parametrize(
    ("pretrained", "random", "expected"),
    [
        pytest.param((100, 110, 105), (98, 104, 108), "like random", id="within-noise"),
        pytest.param((150, 152, 149), (98, 104, 101), "better than random (+24.7 ± 9.6 points)", id="gain"),
        pytest.param((60, 64, 59), (98, 104, 101), "worse than random (-20.0 ± ", id="loss"),
        pytest.param((180, 60, 130), (98, 104, 101), "like random", id="seeds-disagree"),
    ],
)
def test_verdict_names_a_gain_only_beyond_two_standard_errors(pretrained, random, expected) -> None:
    results = outcomes(pretrained, random)
    assert verdicts(results)["attentive"].startswith(expected)
    assert as_json(results, Chance(1 / 6, 0.2))["verdict"]["attentive"].startswith(expected)


def test_report_survives_json() -> None:
    results, chance = outcomes((100, 110), (90, 95)), Chance(1 / 6, 0.2)
    assert from_json(json.loads(json.dumps(as_json(results, chance)))) == (results, chance)


def test_summary_by_hand() -> None:
    """Accuracies .50, .55, .60 of 200 videos: mean .55, deviation .05; the error adds the two variances."""
    row = summarize(outcomes((100, 110, 120), (1, 1, 1)))[0]
    assert (row["mean"], row["deviation"], row["seeds"], row["videos"]) == pytest.approx((0.55, 0.05, 3, 200))
    share = 111 / 202
    assert standard_error(row) == pytest.approx((share * (1 - share) / 200 + 0.05**2 / 3) ** 0.5)
