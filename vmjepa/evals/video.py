"""Video classification on a frozen encoder, always beside the same probes on a randomly initialised one.

    vmjepa evaluate configs/evals/videomamba_tiny_ssv2_16x2x3.yaml pretrain.folder=runs/videomamba_tiny_16x224

Writes RUN/evals/TAG/: results.json, config.yaml, TensorBoard files, and after every epoch probes.pt, the probes' state.
Nothing in it is random but the seeded start of the probes and the seeded cuts of training clips; validation clips are
fixed, each video counts exactly once, and the accuracy is that after the last epoch, not the best one.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections import Counter
from typing import Any

import torch
from rich.console import Console
from torch import nn

from vmjepa.config import EvalConfig
from vmjepa.data.samples import Samples
from vmjepa.data.shards import open_dataset
from vmjepa.errors import ConfigError, DataError, storage_error
from vmjepa.evals.earlier import CONFIG, PROBES, RESULTS, identity, output_folder, protect_results, saved_state
from vmjepa.evals.features import Arm, Encoder, Looks, build_arms, find_pretrained
from vmjepa.evals.probe_loop import EpochResult, Head, adamw, train_probes
from vmjepa.evals.report import Chance, ProbeResult, as_json, as_table
from vmjepa.evals.sources import FreshTrain, FreshValidation, Videos, cache_train, cache_validation, fit_statistics
from vmjepa.launch.local import check_devices
from vmjepa.models import AttentiveClassifier, LinearProbe, VisionTransformer
from vmjepa.run_dir import write_atomic
from vmjepa.train.distributed import World, init_world
from vmjepa.train.progress import TrainProgress
from vmjepa.train.schedules import Schedule

_HEAD_DIM = 64  # width of an attention head that the probe aims at where neither config nor encoder says


def evaluate(cfg: EvalConfig, device: str | None = None) -> dict[str, Any]:
    """Runs the evaluation on this rank, prints its table on rank 0 and returns what results.json holds.

    Raises:
        UserError: config, data or checkpoint that cannot be used.
    """
    if cfg.eval_name != "video_classification_frozen":
        raise ConfigError(f"eval_name: {cfg.eval_name} is not supported yet; use video_classification_frozen")
    if device is not None:
        check_devices([device])
    if cfg.optimization.threads_per_rank:
        torch.set_num_threads(cfg.optimization.threads_per_rank)
    return Evaluation(cfg, _world(device)).run()


class Evaluation:
    """One rank's part of an evaluation."""

    def __init__(self, cfg: EvalConfig, world: World) -> None:
        self.cfg, self.world = cfg, world
        self.out = output_folder(cfg)
        self.train_samples = _samples(cfg, "dataset_train")
        self.validation_samples = _samples(cfg, "dataset_val")
        _check_same_classes(self.train_samples, self.validation_samples)
        self.pretrained = find_pretrained(cfg)
        protect_results(self.out, cfg, self.pretrained)
        self.arms = build_arms(cfg, self.pretrained, world)
        self.heads = build_heads(cfg, self.arms, world)
        self.last: EpochResult | None = None

    def run(self) -> dict[str, Any]:
        """Trains and validates all probes."""
        cfg, lead = self.cfg, self.world.rank == 0
        state = saved_state(self.out, cfg, self.pretrained, self.world.device) if cfg.resume_checkpoint else None
        first = self._restore(state) if state else 0
        self._open_output(first)
        train, validation = self._sources(state)
        total = train.steps_per_epoch * cfg.optimization.num_epochs
        with TrainProgress("training probes", total, first * train.steps_per_epoch, lead) as progress:
            train_probes(
                self.heads,
                train,
                validation,
                _schedule(cfg, train.steps_per_epoch),
                self.world,
                cfg.optimization.use_bfloat16,
                first,
                self._epoch_done,
                lambda done: progress.update(done, "steps"),
            )
        if self._board:
            self._board.close()
        return self._report()

    def _open_output(self, first_epoch: int) -> None:
        """Folder, config and TensorBoard file, on rank 0."""
        self._board: Any = None
        if self.world.rank != 0:
            return
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise storage_error(error, f"creating {self.out}") from error
        write_atomic(self.out / CONFIG, self.cfg.to_yaml())
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(self.out / "tensorboard"), purge_step=first_epoch + 1)

    def _restore(self, state: dict[str, Any]) -> int:
        """Takes up the saved probes; returns the epochs they have had."""
        self.last = EpochResult(**state["result"])
        for head, saved in zip(self.heads, state["heads"], strict=True):
            head.probe.load_state_dict(saved["probe"])
            head.optimizer.load_state_dict(saved["optimizer"])
        return state["epochs"]

    def _sources(self, state: dict[str, Any] | None) -> tuple[Any, Any]:
        """Training and validation tokens; the arms' statistics are set on the way."""
        cfg, data = self.cfg, self.cfg.data
        joined = cfg.optimization.attend_across_segments
        train_looks = Looks(data.num_segments if joined else 1, 1, joined)
        train = Videos(cfg, self.train_samples, self.arms, train_looks, self.world)
        looks = Looks(data.num_segments, data.num_views_per_segment, joined)
        validation = Videos(cfg, self.validation_samples, self.arms, looks, self.world)
        if cfg.probe.cached_draws:
            self._check_memory(train_looks, looks)
            total = -(-cfg.probe.cached_draws * len(self.train_samples) // cfg.optimization.batch_size)
            with TrainProgress("encoding clips", total, 0, self.world.rank == 0) as progress:
                cached = cache_train(train, cfg.probe.cached_draws, lambda done: progress.update(done, "batches"))
            return cached, cache_validation(validation)
        if state and state["statistics"]:
            for arm, statistics in zip(self.arms, state["statistics"], strict=True):
                arm.statistics = tuple(statistics)
        elif cfg.probe.standardize:
            fit_statistics(train)
        before = self.last.replaced if self.last and self.world.rank == 0 else 0
        return FreshTrain(train, before), FreshValidation(validation)

    def _check_memory(self, train: Looks, validation: Looks) -> None:
        draws = self.cfg.probe.cached_draws
        clips = draws * len(self.train_samples) * train.count * train.clips_per_look
        clips += len(self.validation_samples) * validation.count * validation.clips_per_look
        trained = self.pretrained.config.data
        side = self.cfg.resolution // trained.patch_size
        tokens = self.cfg.data.frames_per_clip // trained.tubelet_size * side**2
        need = clips * tokens * sum(arm.encoder.embed_dim for arm in self.arms) * 4
        have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if need > have // 2:
            raise ConfigError(
                f"probe.cached_draws: {draws} draws of {len(self.train_samples)} videos take {need / 2**30:.0f} GiB, "
                f"over half of this computer's {have / 2**30:.0f} GiB; use 0 to encode the clips anew in every epoch"
            )

    def _epoch_done(self, result: EpochResult) -> None:
        self.last = result
        if self.world.rank != 0:
            return
        for head, loss, train_accuracy, correct in zip(
            self.heads, result.train_loss, result.train_accuracy, result.correct, strict=True
        ):
            arm = self.arms[head.arm]
            sees = "one_frame" if arm.single_frame else "clip"
            name = f"{head.kind}_{sees}/{arm.encoder_name}_seed{head.seed}"
            for group, value in (("train_loss", loss), ("train_accuracy", train_accuracy)):
                self._board.add_scalar(f"{group}/{name}", value, result.epoch + 1)
            self._board.add_scalar(f"accuracy/{name}", correct / result.total, result.epoch + 1)
        self._save(result)

    def _save(self, result: EpochResult) -> None:
        """probes.pt: enough to continue after this epoch, and the trained probes at the end."""
        state = {
            "config": self.cfg.to_yaml(),
            "checkpoint": identity(self.pretrained),
            "epochs": result.epoch + 1,
            "result": vars(result),
            "statistics": [arm.statistics for arm in self.arms] if self.cfg.probe.standardize else None,
            "heads": [{"probe": h.probe.state_dict(), "optimizer": h.optimizer.state_dict()} for h in self.heads],
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomic(self.out / PROBES, buffer.getvalue())

    def _report(self) -> dict[str, Any]:
        assert self.last is not None
        results = [
            ProbeResult(
                self.arms[head.arm].encoder_name,
                self.arms[head.arm].single_frame,
                head.kind,
                head.seed,
                correct,
                self.last.total,
                train_accuracy,
            )
            for head, correct, train_accuracy in zip(
                self.heads, self.last.correct, self.last.train_accuracy, strict=True
            )
        ]
        counts = Counter(self.validation_samples.labels.tolist())
        chance = Chance(1 / self.cfg.data.num_classes, max(counts.values()) / len(self.validation_samples))
        report = {
            "run": str(self.cfg.pretrain.folder),
            "checkpoint": self.pretrained.checkpoint.name,
            "checkpoint_sha256": identity(self.pretrained)["sha256"],
            "encoder": self.pretrained.config.model.model_name,
            "train_videos": len(self.train_samples),
            "validation_videos": len(self.validation_samples),
            "replaced_clips": self.last.replaced,
            "epochs": self.cfg.optimization.num_epochs,
        } | as_json(results, chance)
        if self.world.rank == 0:
            write_atomic(self.out / RESULTS, json.dumps(report, indent=1) + "\n")
            title = (
                f"accuracy on {len(self.validation_samples)} validation videos, mean ± deviation over "
                f"{len(self.cfg.optimization.seeds)} probe seeds"
            )
            Console(width=None if sys.stdout.isatty() else 110).print(
                as_table(results, chance, title, self.last.replaced)
            )
            print(f"results: {self.out / RESULTS}")
        return report


def build_heads(cfg: EvalConfig, arms: list[Arm], world: World) -> list[Head]:
    """A probe per arm, kind and seed; probes of one kind and seed start from equal weights on every encoder of a width.

    Raises:
        ConfigError: probe.num_heads does not divide the encoder's width.
    """
    heads = []
    for number, arm in enumerate(arms):
        for kind in dict.fromkeys(cfg.probe.kinds):
            for seed in dict.fromkeys(cfg.optimization.seeds):
                torch.manual_seed(seed)
                probe = _probe(cfg, kind, arm.encoder).to(world.device)
                heads.append(Head(number, kind, seed, probe, adamw(probe, cfg.optimization.weight_decay)))
    return heads


def _probe(cfg: EvalConfig, kind: str, encoder: Encoder) -> nn.Module:
    if kind == "linear":
        return LinearProbe(encoder.embed_dim, cfg.data.num_classes)
    heads = cfg.probe.num_heads or _attention_heads(encoder)
    return AttentiveClassifier(encoder.embed_dim, heads, cfg.data.num_classes, cfg.probe.depth)


def _attention_heads(encoder: Encoder) -> int:
    """A transformer's own number of heads; else the divisor of the width whose heads are nearest to 64 wide."""
    if isinstance(encoder, VisionTransformer):
        return encoder.num_heads
    divisors = [heads for heads in range(1, encoder.embed_dim + 1) if encoder.embed_dim % heads == 0]
    return min(divisors, key=lambda heads: abs(encoder.embed_dim / heads - _HEAD_DIM))


def _schedule(cfg: EvalConfig, steps_per_epoch: int) -> Schedule:
    """Linear warmup, then a cosine that ends with the last epoch; constant weight decay."""
    o = cfg.optimization
    decay = o.weight_decay
    return Schedule(
        steps_per_epoch, o.num_epochs, o.warmup, 1.0, o.start_lr, o.lr, o.final_lr, decay, decay, (1.0, 1.0)
    )


def _samples(cfg: EvalConfig, key: str) -> Samples:
    """The labelled videos of data.dataset_train or data.dataset_val, all with a label below num_classes."""
    samples = Samples([open_dataset(path) for path in getattr(cfg.data, key)])
    wrong = [i for i, label in enumerate(samples.labels.tolist()) if not 0 <= label < cfg.data.num_classes]
    if wrong:
        label = int(samples.labels[wrong[0]])
        what = "has no label" if label < 0 else f"has label {label}, but data.num_classes is {cfg.data.num_classes}"
        raise DataError(
            f"data.{key}: {samples.describe(wrong[0])} {what} ({len(wrong)} such videos); "
            "a probe needs labels 0 … num_classes - 1: label the videos, or correct data.num_classes"
        )
    return samples


def _check_same_classes(*sets: Samples) -> None:
    """Class folders are numbered anew in every packing, so a class missing from one of them shifts its numbers."""
    names: dict[int, set[str]] = {}
    for samples in sets:
        for label, found in samples.class_names().items():
            names.setdefault(label, set()).update(found)
    for label, found in sorted(names.items()):
        if len(found) > 1:
            raise DataError(
                f"label {label} means {' and '.join(map(repr, sorted(found)))} in the datasets of this evaluation; "
                "pack all of them from folders with the same classes, or from CSVs that number the classes alike"
            )


def _world(device: str | None) -> World:
    """torchrun's world, or this process alone, which needs no process group."""
    if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        return init_world(device)
    return World(0, 1, torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")))
