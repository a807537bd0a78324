"""What an evaluation found, as JSON, as a table and as one plain sentence per probe."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from rich.table import Table


@dataclass(frozen=True)
class ProbeResult:
    """One trained probe. encoder: "pretrained" or "random"; accuracy = correct / total on the validation videos."""

    encoder: str
    single_frame: bool
    probe: str
    seed: int
    correct: int
    total: int
    train_accuracy: float

    @property
    def accuracy(self) -> float:
        """Share of validation videos classified right."""
        return self.correct / self.total


@dataclass(frozen=True)
class Chance:
    """What needs no video: guessing evenly, and always naming the commonest label of the validation set."""

    uniform: float
    majority: float


def summarize(results: Sequence[ProbeResult]) -> list[dict[str, Any]]:
    """Mean and standard deviation over the seeds for every probe, input and encoder, in order of first appearance."""
    groups: dict[tuple[str, bool, str], list[ProbeResult]] = {}
    for result in results:
        groups.setdefault((result.probe, result.single_frame, result.encoder), []).append(result)
    rows = []
    for (probe, single_frame, encoder), members in groups.items():
        accuracies = [member.accuracy for member in members]
        mean = sum(accuracies) / len(accuracies)
        deviation = math.sqrt(sum((a - mean) ** 2 for a in accuracies) / max(1, len(accuracies) - 1))
        rows.append(
            {
                "probe": probe,
                "single_frame": single_frame,
                "encoder": encoder,
                "mean": mean,
                "deviation": deviation,
                "seeds": len(members),
                "videos": members[0].total,
            }
        )
    return rows


def standard_error(row: Mapping[str, Any]) -> float:
    """Standard error of a row's mean: drawing of the validation videos (binomial) and of the probe's seed, added.

    It takes validation videos for independent; where they share scenes or pictures the truth is wider. The binomial
    share is taken one success and one failure further in, so that it is not certain of 0 or 100 % of a few videos.
    """
    videos = row["videos"]
    share = (row["mean"] * videos + 1) / (videos + 2)
    return math.sqrt(share * (1 - share) / videos + row["deviation"] ** 2 / row["seeds"])


def verdict(pretrained: Mapping[str, Any], random: Mapping[str, Any]) -> str:
    """Whether pretraining helped, in points ± two standard errors; a smaller difference does not count."""
    gain = pretrained["mean"] - random["mean"]
    margin = 2 * math.hypot(standard_error(pretrained), standard_error(random))
    found = "like random" if abs(gain) <= margin else "better than random" if gain > 0 else "worse than random"
    return f"{found} ({100 * gain:+.1f} ± {100 * margin:.1f} points)"


def verdicts(results: Sequence[ProbeResult]) -> dict[str, str]:
    """A verdict per probe kind on whole clips, where both encoders were probed."""
    rows = {(row["probe"], row["encoder"]): row for row in summarize(results) if not row["single_frame"]}
    kinds = dict.fromkeys(kind for kind, _ in rows)
    return {
        kind: verdict(rows[kind, "pretrained"], rows[kind, "random"])
        for kind in kinds
        if {(kind, "pretrained"), (kind, "random")} <= rows.keys()
    }


def as_json(results: Sequence[ProbeResult], chance: Chance) -> dict[str, Any]:
    """The figures of results.json."""
    return {
        "chance": asdict(chance),
        "verdict": verdicts(results),
        "summary": summarize(results),
        "probes": [{**asdict(result), "accuracy": result.accuracy} for result in results],
    }


def from_json(report: Mapping[str, Any]) -> tuple[list[ProbeResult], Chance]:
    """The arguments of `as_json`, from what it gave."""
    names = [field.name for field in fields(ProbeResult)]
    results = [ProbeResult(**{name: probe[name] for name in names}) for probe in report["probes"]]
    return results, Chance(**report["chance"])


def as_table(results: Sequence[ProbeResult], chance: Chance, title: str, replaced: int = 0) -> Table:
    """Pretrained beside random, a row per probe kind and input, validation accuracy in per cent.

    Below it the number of training clips that were `replaced` because they could not be decoded, where not 0.
    """
    rows = {(row["probe"], row["single_frame"], row["encoder"]): row for row in summarize(results)}
    encoders = list(dict.fromkeys(encoder for _, _, encoder in rows))
    note = f"training clips that could not be decoded, another's in their place: {replaced}" if replaced else None
    table = Table(title=title, title_justify="left", caption=note, caption_justify="left")
    table.add_column("probe")
    table.add_column("sees")
    for encoder in encoders:
        table.add_column(encoder, justify="right")
    table.add_column("pretrained encoder does")
    judged = verdicts(results)
    for probe, single_frame in dict.fromkeys((probe, single_frame) for probe, single_frame, _ in rows):
        cells = [_cell(rows.get((probe, single_frame, encoder))) for encoder in encoders]
        last = "" if single_frame else judged.get(probe, "")
        table.add_row(probe, "one frame" if single_frame else "whole clip", *cells, last)
    guess = f"{100 * chance.uniform:.1f} %"
    table.add_row("guessing", "nothing", *[guess] * len(encoders), f"(commonest label: {100 * chance.majority:.1f} %)")
    return table


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    spread = f" ± {100 * row['deviation']:.1f}" if row["seeds"] > 1 else ""
    return f"{100 * row['mean']:.1f}{spread} %"
