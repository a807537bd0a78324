"""Pretraining: the loop.

    vmjepa pretrain configs/pretrain/videomamba_tiny_16x224.yaml logging.folder=runs/tiny --devices cuda:0 cuda:1

Everything in a step follows from (config, step): the samples, their crops, the masks, the learning rate. So a killed
run continues from its last checkpoint as if nothing had happened, at any number of ranks.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vmjepa.config import PretrainConfig
from vmjepa.data.loader import Batch, to_model_input, train_loader
from vmjepa.data.shards import open_dataset
from vmjepa.errors import EXIT_REQUEUE, ConfigError, DivergedError, PeerLostError
from vmjepa.jepa import JEPA, skill_baseline
from vmjepa.masks import GlobalMask, StepMask, draw_mask
from vmjepa.models import build_encoder, build_predictor, decays
from vmjepa.run_dir import RunDir, provenance, read_json, write_atomic
from vmjepa.run_status import failures_shown
from vmjepa.train import checkpoint, control
from vmjepa.train.attempt import Attempt
from vmjepa.train.distributed import World, barrier, init_world, peer_lost, sum_over_ranks
from vmjepa.train.ema import TargetEncoder
from vmjepa.train.engine import MODULES, Engine, EngineSettings, partition_target
from vmjepa.train.metrics import MetricsWriter, TokenSpread, memory_gib, target_ranks
from vmjepa.train.progress import TrainProgress
from vmjepa.train.schedules import Schedule

log = logging.getLogger(__name__)


def pretrain(cfg: PretrainConfig, device: str | None = None) -> int:
    """Runs, or resumes, a pretraining on this rank; returns the exit code (0 done, 85 saved and resumable).

    Raises:
        UserError: config, data, checkpoint or disk that cannot be used.
    """
    if _is_done(cfg):
        if os.environ.get("RANK", "0") == "0":
            print(f"{cfg.logging.folder} is done: all {cfg.total_steps} steps; nothing to do", file=sys.stderr)
        return 0
    if cfg.engine.threads_per_rank:
        torch.set_num_threads(cfg.engine.threads_per_rank)
    with failures_shown(cfg.logging.folder):
        world = init_world(device)
    with Attempt(RunDir(cfg.logging.folder), world, cfg.monitor.hang_seconds) as attempt:
        return _train(cfg, world, attempt)


def _is_done(cfg: PretrainConfig) -> bool:
    """True when the run directory holds a finished run of this model and data, of at least as many steps.

    It is then left as it is. Where model or data differ, the ordinary start says what is wrong.
    """
    run = RunDir(cfg.logging.folder)
    if not cfg.meta.load_checkpoint or not run.status.is_file():
        return False
    try:
        status = read_json(run.status)
        finished = status["state"] == "done" and status["step"] >= cfg.total_steps
    except (OSError, ValueError, KeyError, TypeError):
        return False
    other = [key for key in _changed_keys(run, cfg) if key.startswith(("model.", "data.", "config.yaml"))]
    return finished and not other and checkpoint.latest(run.root) is not None


def _train(cfg: PretrainConfig, world: World, attempt: Attempt) -> int:
    try:
        trainer = Trainer(cfg, world, attempt)
        try:
            return trainer.run()
        finally:
            trainer.close()
    except RuntimeError as error:
        if world.size > 1 and peer_lost(error):
            raise PeerLostError("another rank has ended, so this one cannot go on; see that rank's message") from error
        raise


class Trainer:
    """One rank's part of a run: model, target, data, and the step that ties them together."""

    def __init__(self, cfg: PretrainConfig, world: World, attempt: Attempt):
        self.cfg, self.world, self.attempt = cfg, world, attempt
        self.run_dir = attempt.run
        self.control = control.Control(self.run_dir.control, world)  # first: a stop may be asked for while we build
        self._resume_from = self._find_checkpoint()
        read = cfg.meta.read_checkpoint
        self._start_from = checkpoint.resolve(read) if read and self._resume_from is None else None
        opt = cfg.optimization
        self.schedule = Schedule(
            opt.ipe, opt.epochs, opt.warmup, opt.ipe_scale, opt.start_lr, opt.lr, opt.final_lr,
            opt.weight_decay, opt.final_weight_decay, opt.ema,
        )  # fmt: skip
        self.total = cfg.total_steps
        self.micro_batch, self.global_batch = cfg.micro_batch(world.size), cfg.global_batch(world.size)
        self.done = 0
        datasets = [open_dataset(path) for path in cfg.data.datasets]
        self._build_model()
        self.loader = train_loader(cfg, datasets, world.rank, world.size, self.done, world.device)
        self.batches = iter(self.loader)
        self._describe_run()  # last, so that a run that cannot start leaves an earlier one as it was
        self.metrics = MetricsWriter(self.run_dir, world.rank == 0, cfg.monitor.tensorboard, self.done)
        self.replaced = 0  # clips of this rank, since this start

    def _find_checkpoint(self) -> Path | None:
        found = checkpoint.latest(self.run_dir.root)
        if found is not None and not self.cfg.meta.load_checkpoint:
            raise ConfigError(
                f"meta.load_checkpoint is false, but {self.run_dir.checkpoints} holds {found.name}, which a new run "
                "would overwrite; set it to true to resume, or choose another logging.folder"
            )
        return found

    def _describe_run(self) -> None:
        barrier()
        if self.world.rank == 0:
            changed = _changed_keys(self.run_dir, self.cfg) if self._resume_from else []
            if changed:
                log.warning("resuming with a changed config: %s", ", ".join(changed))
            facts = json.dumps(provenance(self.world.size), indent=1)
            write_atomic(self.run_dir.config, self.cfg.to_yaml())
            write_atomic(self.run_dir.root / "provenance.json", facts)
            write_atomic(self.run_dir.attempt(self.attempt.number) / "provenance.json", facts)
        barrier()

    def _build_model(self) -> None:
        cfg, world = self.cfg, self.world
        torch.manual_seed(cfg.meta.seed)
        encoder = build_encoder(cfg)
        model = JEPA(encoder, build_predictor(cfg, encoder), cfg.loss.loss_exp, cfg.loss.reg_coeff)
        optimizer_state = target_state = None
        folder = self._resume_from or self._start_from
        if folder is not None:
            saved = checkpoint.load(folder)
            expected = model.state_dict()
            online = {k: v for k, v in saved.model.items() if not k.startswith("target_encoder.")}
            checkpoint.check_fits(folder, online, expected)
            model.load_state_dict(online)
            target_state = checkpoint.part(saved.model, "target_encoder")
            if self._resume_from:
                self.done, optimizer_state = saved.step, saved.optimizer
        zero = cfg.engine.zero_stage
        bfloat16 = cfg.meta.dtype == "bfloat16"
        self.target = TargetEncoder(
            model.encoder,
            world.device,
            target_state,
            partition_target(bfloat16) if zero == 3 else None,
            torch.bfloat16 if bfloat16 else None,
        )
        opt = cfg.optimization
        settings = EngineSettings(self.micro_batch, opt.accumulation_steps, zero, opt.betas, opt.eps, bfloat16)
        self.engine = Engine(model, settings, world, decays, optimizer_state)

    def run(self) -> int:
        """Steps until the end or a stop request; saves on the way."""
        cfg, lead = self.cfg, self.world.rank == 0
        every = cfg.checkpoint.every_steps or cfg.optimization.ipe
        values: dict[str, float] = {}
        self._clock, self._waited, self._counted = time.monotonic(), self.loader.wait_seconds, self.done
        state = "running"
        self.attempt.beat(state, self.done, self.total, values)
        with TrainProgress(self.run_dir.root.name, self.total, self.done, lead, self.attempt.log) as progress:
            if self.done:
                progress.say(f"resuming {self.run_dir.root} after step {self.done}")
            while self.done < self.total and state == "running":
                observed = self.step(self.done)
                self.done += 1
                if observed:
                    values = observed
                    self.metrics.write(self.done, values)
                    self.attempt.beat(state, self.done, self.total, values)
                self.attempt.tick(self.done)
                progress.update(self.done, _headline(observed) if observed else "")
                request = self.control.poll()
                if request == control.STOP and self.done < self.total:
                    state = "stopped"
                    progress.say(f"asked to stop: saving step {self.done}")
                if self.done % every == 0 or self.done == self.total or request != control.NOTHING:
                    self.save()
            if state == "stopped":
                progress.say(f"saved step {self.done}; the same command continues from there")
            else:
                progress.say(f"done: step {self.done}, {self.run_dir.checkpoints}/step_{self.done:08d}")
        state = "done" if self.done >= self.total else state
        self.attempt.beat(state, self.done, self.total, values)
        return 0 if state == "done" else EXIT_REQUEUE

    def step(self, step: int) -> dict[str, float] | None:
        """One optimizer step on all ranks; returns metrics when this step is to be logged."""
        cfg, opt, world, watchdog = self.cfg, self.cfg.optimization, self.world, self.attempt.watchdog
        observer = Observer(self) if (step + 1) % cfg.monitor.every_steps == 0 or step + 1 == self.total else None
        torch.manual_seed((cfg.meta.seed << 32) + step * world.size + world.rank)  # DropPath
        masks = [
            draw_mask(spec, cfg.grid, self.global_batch, cfg.meta.seed, step, number, cfg.masking.truncate)
            for number, spec in enumerate(cfg.mask)
        ]
        loss = torch.zeros((), device=world.device)
        for micro in range(opt.accumulation_steps):
            watchdog.reach(step, "waiting for the data of")
            batch = next(self.batches)
            watchdog.reach(step, "computing")
            clips, parts = self._prepare(batch, masks)
            features = self.target.features(clips)
            share, predictions = self.engine.micro_step(clips, parts, features)
            loss += share
            if observer:
                observer.add(features, predictions, parts)
            if micro + 1 < opt.accumulation_steps:
                self.engine.advance()
        clipping = opt.clip_grad is not None and step // opt.ipe > opt.warmup  # V-JEPA does not clip during warmup
        norms = self.engine.clip(dict.fromkeys(MODULES, opt.clip_grad if clipping else None))
        lr, decay, momentum = (
            f(step) for f in (self.schedule.lr_at, self.schedule.weight_decay_at, self.schedule.momentum_at)
        )
        self.engine.step(lr, decay)
        self.target.update(self.engine.model.encoder, momentum)
        if observer is None:
            return None
        values = {"epoch": step // opt.ipe, "lr": lr, "weight_decay": decay, "momentum": momentum}
        return observer.values(step, loss, norms) | values | self._speed()

    def _prepare(self, batch: Batch, masks: list[GlobalMask]) -> tuple[Tensor, list[StepMask]]:
        """Model input (B, 3, T, H, W) and these clips' masks: all first clips of the videos, then all second, …"""
        for message in batch.replaced:
            log.warning("%s", message)
        self.replaced += len(batch.replaced)
        size, count = self.micro_batch, len(batch.clips)
        first = (batch.micro * self.world.size + self.world.rank) * size
        rows = np.tile(np.arange(first, first + size), count)
        clips = to_model_input(torch.cat(batch.clips), self.cfg.data.normalize, self.world.device, torch.float32)
        return clips, [mask.rows(rows, self.world.device, count) for mask in masks]

    def _speed(self) -> dict[str, float]:
        now, waited = time.monotonic(), self.loader.wait_seconds
        seconds = max(now - self._clock, 1e-9)
        steps = self.done + 1 - self._counted
        clips = steps * self.global_batch * self.cfg.data.num_clips
        share = (waited - self._waited) / seconds
        self._clock, self._waited, self._counted = now, waited, self.done + 1
        return {
            "clips_per_s": clips / seconds,
            "step_seconds": seconds / steps,
            "data_wait": share,
            "memory_gib": memory_gib(self.world.device),
        }

    def save(self) -> None:
        """Publishes a checkpoint of the steps done; all ranks take part, rank 0 writes.

        Raises:
            DivergedError: when a weight is no finite number; earlier checkpoints are then intact.
        """
        watchdog = self.attempt.watchdog
        watchdog.reach(self.done - 1, "gathering the weights after")
        model = self.engine.model_state()
        model |= {f"target_encoder.{name}": value for name, value in self.target.state_dict().items()}
        state = checkpoint.Checkpoint(self.done, model, self.engine.optimizer_state())
        watchdog.reach(self.done - 1, "writing the checkpoint after")
        if self.world.rank == 0:
            for name, value in model.items():
                if not value.isfinite().all():
                    raise _diverged(self.done, f"{name} is not finite", self.run_dir)
            extra = {"world_size": self.world.size, "zero_stage": self.cfg.engine.zero_stage}
            checkpoint.save(self.run_dir, state, extra, self.cfg.checkpoint.keep)
        watchdog.reach(self.done - 1, "waiting for the checkpoint after")
        barrier()

    def close(self) -> None:
        """Ends threads and files; the process group stays."""
        self.loader.close()
        self.metrics.close()
        self.control.close()


class Observer:
    """Gathers, over the micro-batches of one logged step, what plain training does not compute."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        encoder: Any = trainer.engine.model.encoder
        dim, device = encoder.embed_dim, trainer.world.device
        self.baseline = torch.zeros((), device=device)
        self.target_spread, self.prediction_spread = TokenSpread(dim, device), TokenSpread(dim, device)
        self.features: Tensor | None = None

    def add(self, features: Tensor, predictions: list[Tensor], masks: list[StepMask]) -> None:
        """One micro-batch: target features (B, N, D), predictions per mask.

        The skill's baseline is the mean over this micro-batch on all ranks, so the skill (not the loss) depends a
        little on how the global batch is cut.
        """
        mean = sum_over_ranks(features.sum(dim=0)) / (features.shape[0] * self.trainer.world.size)
        self.baseline += skill_baseline(features, mean, masks, self.trainer.cfg.loss.loss_exp)
        self.target_spread.add(features)
        for prediction, mask in zip(predictions, masks, strict=True):
            self.prediction_spread.add(prediction, mask)
        self.features = features

    def values(self, step: int, loss: Tensor, norms: Tensor) -> dict[str, float]:
        """Metrics of the whole step, the same on all ranks but for the rank of the features (this rank's clips)."""
        trainer = self.trainer
        mine = torch.tensor(float(trainer.replaced), device=loss.device)
        loss, baseline, replaced = sum_over_ranks(torch.stack([loss, self.baseline, mine])).tolist()
        encoder, predictor = norms.tolist()
        if not math.isfinite(loss + encoder + predictor):
            found = f"loss {loss:g}, gradient norms {encoder:g} and {predictor:g}"
            raise _diverged(step + 1, found, trainer.run_dir)
        values = {
            "loss": loss,
            **({"skill": 1 - loss / baseline} if baseline > 0 else {}),  # one clip alone is its own mean
            "replaced_clips": replaced,
            "grad_norm_encoder": encoder,
            "grad_norm_predictor": predictor,
            "grad_ratio": encoder / max(predictor, 1e-30),
            "target_variance": float(self.target_spread.variance()),
            "prediction_variance": float(self.prediction_spread.variance()),
        }
        monitor = trainer.cfg.monitor
        every = monitor.rank_every_steps
        if self.features is not None and (step + 1) // every > (step + 1 - monitor.every_steps) // every:
            values |= target_ranks(self.features)
        return values


def _headline(values: dict[str, float]) -> str:
    skill = f"  skill {values['skill']:.3f}" if "skill" in values else ""
    text = "loss {loss:.4f}" + skill + "  lr {lr:.1e}  {clips_per_s:.1f} clips/s  wait {data_wait:.0%}"
    return text.format(**values)


def _diverged(step: int, found: str, run: RunDir) -> DivergedError:
    return DivergedError(
        f"{run.root}: training has diverged by step {step} ({found}); lower optimization.lr, lengthen warmup or set "
        "clip_grad. The last checkpoint saved is still good"
    )


def _changed_keys(run: RunDir, cfg: PretrainConfig) -> list[str]:
    """Keys of the run's recorded config that differ now, as section.key."""
    import yaml

    if not run.config.exists():
        return []
    try:
        before = yaml.safe_load(run.config.read_text())
    except (yaml.YAMLError, UnicodeDecodeError):
        before = None
    if not isinstance(before, dict):
        return [f"{run.config.name} was unreadable"]
    now = yaml.safe_load(cfg.to_yaml())
    changed = []
    for section in now:
        old, new = before.get(section), now[section]
        if isinstance(old, dict) and isinstance(new, dict):
            changed += [f"{section}.{key}" for key in new if old.get(key) != new[key]]
        elif old != new:
            changed.append(section)
    return changed
