"""Run under torchrun by test_engine.py: trains a small JEPA at every ZeRO stage and writes what came out.

Every stage takes the same steps (two micro-batches each, clipped per module, EMA target); half way the state is
gathered, thrown away and restored into a fresh engine of the *next* stage, so portability is exercised as well.
"""

from __future__ import annotations

import sys

import torch
from torch import nn

from vmjepa.jepa import JEPA
from vmjepa.masks import StepMask, TokenSet
from vmjepa.train.distributed import init_world
from vmjepa.train.ema import TargetEncoder
from vmjepa.train.engine import Engine, EngineSettings, partition_target

TOKENS, WIDTH, STEPS, SAMPLES, MICRO = 6, 7, 4, 8, 2
LIMITS = {"encoder": 0.02, "predictor": 0.05}


class Encoder(nn.Module):
    """Tokens = pixels through two layers; odd sizes, so ZeRO has to pad."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(5, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, clips, context):
        tokens = self.second(torch.tanh(self.norm(self.first(clips))))
        if context is None:
            return tokens
        return tokens.gather(1, context.index[..., None].expand(-1, -1, WIDTH))


class Predictor(nn.Module):
    def __init__(self):
        super().__init__()
        self.mask_tokens = nn.Parameter(torch.linspace(-1, 1, 2 * WIDTH).reshape(2, 1, 1, WIDTH))
        self.mix, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens, context, target, number):
        shape = (*target.index.shape, WIDTH)
        place = torch.sin(target.index[..., None].float() * torch.arange(1, WIDTH + 1))
        real = context.real()[..., None].float()
        seen = (tokens * real).sum(1, keepdim=True) / real.sum(1, keepdim=True)
        return self.out(torch.relu(self.mix(seen + place + self.mask_tokens[number].expand(shape))))


def build() -> JEPA:
    torch.manual_seed(0)
    return JEPA(Encoder(), Predictor())


def decays(name: str, parameter: nn.Parameter) -> bool:
    return not name.endswith("bias") and len(getattr(parameter, "ds_shape", parameter.shape)) > 1


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Clips of a global batch and how many of each clip's tokens are context (2 or 3)."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(SAMPLES, TOKENS, 5, generator=generator), torch.randint(2, 4, (SAMPLES,), generator=generator)


def masks_of(counts: torch.Tensor, total: int) -> list[StepMask]:
    """Two masks: the first `count` tokens are context, and the other way round; the rest is predicted."""
    first, rest = [], []
    for count in counts.tolist():
        first.append(torch.arange(count))
        rest.append(torch.arange(count, TOKENS))

    def pack(rows: list[torch.Tensor]) -> TokenSet:
        lengths = torch.tensor([len(row) for row in rows])
        return TokenSet(nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths)

    short, long = pack(first), pack(rest)
    return [StepMask(short, long, SAMPLES * TOKENS - total, SAMPLES), StepMask(long, short, total, SAMPLES)]


def start(stage: int, world, model_state=None, target_state=None, optimizer_state=None):
    model = build()
    target_source = build().encoder
    if model_state is not None:
        model.load_state_dict(model_state)
    settings = EngineSettings(SAMPLES // (MICRO * world.size), MICRO, stage, (0.9, 0.999), 1e-8)
    partition = partition_target(False) if stage == 3 else None
    target = TargetEncoder(target_source, world.device, target_state, partition)
    return Engine(model, settings, world, decays, optimizer_state), target


def train(engine: Engine, target: TargetEncoder, world, steps: range) -> list[list[float]]:
    log = []
    size = engine.settings.batch_size
    for step in steps:
        clips, counts = batch(step)
        loss = torch.zeros(())
        for micro in range(MICRO):
            first = (micro * world.size + world.rank) * size
            rows = slice(first, first + size)
            features = target.features(clips[rows])
            share, _ = engine.micro_step(clips[rows], masks_of(counts[rows], int(counts.sum())), features)
            loss += share
            if micro < MICRO - 1:
                engine.advance()
        norms = engine.clip(LIMITS)
        engine.step(lr=0.01 * (step + 1), weight_decay=0.1)
        target.update(engine.model.encoder, 0.9)
        torch.distributed.all_reduce(loss)
        log.append([loss.item(), *norms.tolist()])
    return log


def main(out: str) -> None:
    torch.set_num_threads(1)
    world = init_world("cpu")
    results = {}
    for stage in range(4):
        engine, target = start(stage, world)
        log = train(engine, target, world, range(STEPS // 2))
        saved = engine.model_state(), target.state_dict(), engine.optimizer_state()
        moved, moved_target = start((stage + 1) % 4, world, *saved)
        moved_log = log + train(moved, moved_target, world, range(STEPS // 2, STEPS))
        log = log + train(engine, target, world, range(STEPS // 2, STEPS))
        results[stage] = {"log": log, "model": engine.model_state(), "target": target.state_dict()}
        results[stage] |= {"moved_log": moved_log, "moved_model": moved.model_state()}
    if world.rank == 0:
        torch.save(results, out)


if __name__ == "__main__":
    main(sys.argv[1])
