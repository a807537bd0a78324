"""Trains probes on frozen tokens: all encoders, kinds and seeds in one pass over the data, exact accuracy after it.

Shapes: b videos, G looks at each video that are classified apart (views, or segments x views), L tokens, D features, C
classes. Training averages the loss over the looks, validation the class probabilities, as V-JEPA's evaluation does.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmjepa.train.distributed import World, sum_over_ranks
from vmjepa.train.schedules import Schedule


@dataclass(frozen=True)
class TokenBatch:
    """One micro-batch of this rank: standardised tokens per arm, each (b, G, L, D), and the labels, int64 (b,)."""

    tokens: Sequence[Tensor]
    labels: Tensor


class TrainSource(Protocol):
    """Training videos as tokens, endlessly reshuffled."""

    steps_per_epoch: int
    replaced: int
    """Clips of this rank that could not be decoded and had another's put in their place, so far."""

    def steps(self, start: int) -> Generator[list[TokenBatch]]:
        """Micro-batches of this rank for optimizer step `start`, `start` + 1, …"""


class ValidationSource(Protocol):
    """Validation videos as tokens, each exactly once over all ranks."""

    def batches(self) -> Iterator[TokenBatch]:
        """This rank's share."""


@dataclass
class Head:
    """One probe with its optimizer. arm: index of the frozen encoder (and what it was shown) whose tokens it gets."""

    arm: int
    kind: str
    seed: int
    probe: nn.Module
    optimizer: torch.optim.Optimizer


@dataclass(frozen=True)
class EpochResult:
    """What an epoch gave for each head, summed over all ranks. Counts are videos; train_* are running figures.

    replaced: training clips, since the first epoch, that could not be decoded and had another's put in their place.
    """

    epoch: int
    train_loss: list[float]
    train_accuracy: list[float]
    correct: list[int]
    total: int
    replaced: int = 0


def adamw(probe: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """AdamW with no weight decay on biases and other 1-D parameters; the learning rate is set at every step."""
    decayed = [p for p in probe.parameters() if p.ndim > 1]
    others = [p for p in probe.parameters() if p.ndim <= 1]
    return torch.optim.AdamW([{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0}])


def train_probes(
    heads: Sequence[Head],
    train: TrainSource,
    validation: ValidationSource,
    schedule: Schedule,
    world: World,
    bfloat16: bool,
    first_epoch: int,
    on_epoch: Callable[[EpochResult], None],
    on_step: Callable[[int], None] = lambda done: None,
) -> None:
    """Trains every head for the schedule's epochs, from `first_epoch`, and validates after each.

    Each head sees the same videos in the same order. A step's loss is the mean over the global batch: gradients are
    summed over the ranks. `on_epoch` gets each epoch's result, `on_step` the number of steps done.
    """
    with closing(train.steps(first_epoch * train.steps_per_epoch)) as steps:
        for epoch in range(first_epoch, schedule.epochs):
            numbers = range(epoch * train.steps_per_epoch, (epoch + 1) * train.steps_per_epoch)
            loss, accuracy = _train_epoch(heads, steps, numbers, schedule, world, bfloat16, on_step)
            correct, total = count_correct(heads, validation, world, bfloat16)
            replaced = int(sum_over_ranks_of(world, torch.tensor(train.replaced, device=world.device)))
            on_epoch(EpochResult(epoch, loss, accuracy, correct, total, replaced))


def _train_epoch(
    heads: Sequence[Head],
    steps: Iterator[list[TokenBatch]],
    numbers: range,
    schedule: Schedule,
    world: World,
    bfloat16: bool,
    on_step: Callable[[int], None],
) -> tuple[list[float], list[float]]:
    """Optimizer steps `numbers`; returns each head's mean loss and share of videos classified right on the way."""
    loss = torch.zeros(len(heads), device=world.device)
    correct = torch.zeros(len(heads), dtype=torch.int64, device=world.device)
    seen = 0
    for head in heads:
        head.probe.train()
    for step in numbers:
        batches = next(steps)
        videos = world.size * sum(len(batch.labels) for batch in batches)
        seen += videos
        for i, head in enumerate(heads):
            head_loss, head_correct = _train_step(head, batches, videos, schedule.lr_at(step), world, bfloat16)
            loss[i] += head_loss
            correct[i] += head_correct
        on_step(step + 1)
    loss, correct = sum_over_ranks_of(world, loss), sum_over_ranks_of(world, correct)
    return (loss / len(numbers)).tolist(), (correct / seen).tolist()


def _train_step(
    head: Head, batches: Sequence[TokenBatch], global_videos: int, lr: float, world: World, bfloat16: bool
) -> tuple[Tensor, Tensor]:
    """One optimizer step; returns this rank's share of the mean loss and its number of videos classified right."""
    loss = torch.zeros((), device=world.device)
    correct = torch.zeros((), dtype=torch.int64, device=world.device)
    head.optimizer.zero_grad(set_to_none=True)
    for batch in batches:
        logits = _logits(head, batch, world, bfloat16)
        looks = logits.shape[1]
        share = F.cross_entropy(logits.flatten(0, 1), batch.labels.repeat_interleave(looks), reduction="sum")
        share = share / (looks * global_videos)
        share.backward()
        loss += share.detach()
        correct += _right(logits.detach(), batch.labels)
    if world.size > 1:
        gradients = [p.grad for p in head.probe.parameters() if p.grad is not None]
        summed = sum_over_ranks(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, total in zip(gradients, summed.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(total.view_as(gradient))
    for group in head.optimizer.param_groups:
        group["lr"] = lr
    head.optimizer.step()
    return loss, correct


@torch.no_grad()
def count_correct(
    heads: Sequence[Head], validation: ValidationSource, world: World, bfloat16: bool
) -> tuple[list[int], int]:
    """Validation videos that each head classifies right, and the number of videos, over all ranks."""
    counts = torch.zeros(len(heads) + 1, dtype=torch.int64, device=world.device)
    for head in heads:
        head.probe.eval()
    for batch in validation.batches():
        counts[-1] += len(batch.labels)
        for i, head in enumerate(heads):
            counts[i] += _right(_logits(head, batch, world, bfloat16), batch.labels)
    *correct, total = sum_over_ranks_of(world, counts).tolist()
    return correct, total


def sum_over_ranks_of(world: World, values: Tensor) -> Tensor:
    """The sum over the ranks; `values` itself in a world of one, which needs no process group."""
    return sum_over_ranks(values) if world.size > 1 else values


def _logits(head: Head, batch: TokenBatch, world: World, bfloat16: bool) -> Tensor:
    """(b, G, C) in fp32."""
    tokens = batch.tokens[head.arm]
    with torch.autocast(world.device.type, torch.bfloat16, enabled=bfloat16):
        logits = head.probe(tokens.flatten(0, 1))
    return logits.float().unflatten(0, tokens.shape[:2])


def _right(logits: Tensor, labels: Tensor) -> Tensor:
    """Number of videos whose mean class probability over the looks is largest at the label."""
    return (logits.softmax(-1).mean(1).argmax(-1) == labels).sum()
