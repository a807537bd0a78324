"""What every decoder takes and gives back, and the choice between them.

A decoder turns a list of jobs (bytes, video facts, plans) into one result per job: the clips, or the DecodeError that
belongs to that video alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal, Protocol

import torch

from vmjepa.data.clips import ClipPlan, VideoInfo
from vmjepa.errors import ConfigError

# What DALI's video decoder documents: FFmpeg decodes the first set on the CPU, NVDEC the whole second set.
DALI_CPU_CODECS = frozenset({"vp8", "vp9", "mjpeg"})
DALI_GPU_CODECS = DALI_CPU_CODECS | {"h264", "hevc", "av1", "mpeg4"}


class DecodeError(Exception):
    """A video that cannot be decoded as planned; the message is the reason, without the clip's name."""


class TooFewFrames(DecodeError):
    """The video ended after `decoded` frames, before the last planned one."""

    def __init__(self, decoded: int, wanted: int) -> None:
        super().__init__(f"only {decoded} frames decode, frame {wanted} was wanted")
        self.decoded = decoded


@dataclass(frozen=True, eq=False)
class DecodeJob:
    """One video to decode: the encoded file, its facts, and the clips to cut from it."""

    data: bytes
    video: VideoInfo
    plans: Sequence[ClipPlan]


class Decoder(Protocol):
    """A decode backend. `whole_batches`: it wants a batch's jobs in one call, from one thread."""

    device: torch.device
    whole_batches: bool

    def decode(self, jobs: Sequence[DecodeJob]) -> list[list[torch.Tensor] | DecodeError]:
        """Per job its clips, uint8 (T, size, size, 3) RGB on `device`, or why that video failed."""
        ...


def upright(clip: torch.Tensor, video: VideoInfo, flip: bool) -> torch.Tensor:
    """Turns a stored clip (T, size, size, 3) as the file's rotation says, then mirrors it; contiguous."""
    clip = torch.rot90(clip, video.quarter_turns, dims=(1, 2)) if video.quarter_turns else clip
    return (clip.flip(2) if flip else clip).contiguous()


def choose_decoder(kind: str, codecs: Mapping[str, str], device: torch.device | str) -> Literal["pyav", "dali"]:
    """Picks the decode backend for a dataset.

    Args:
        kind: `data.decoder`: auto, pyav or dali. `auto` takes DALI on a GPU when it can decode every clip, else PyAV,
            which is the faster one on a CPU.
        codecs: each codec of the dataset ("" = unknown: a loose file) and the description of one clip that has it.
        device: where the clips are wanted.

    Raises:
        ConfigError: `dali` cannot decode one of the clips, or is not installed.
    """
    gpu = torch.device(device).type == "cuda"
    if kind == "pyav" or (kind == "auto" and not gpu):
        return "pyav"
    refused = [codec for codec in sorted(codecs) if codec not in (DALI_GPU_CODECS if gpu else DALI_CPU_CODECS)]
    installed = find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None
    if kind == "auto":
        return "dali" if installed and not refused else "pyav"
    if not installed:
        raise ConfigError("data.decoder=dali: DALI is not installed; install nvidia-dali or set data.decoder=auto")
    if refused and refused[0] == "":
        raise ConfigError(
            f"data.decoder=dali reads shards, not loose files ({codecs['']}); "
            "pack them with `python -m tools.shard run` or set data.decoder=auto"
        )
    if refused:
        where, can = ("the GPU", DALI_GPU_CODECS) if gpu else ("the CPU", DALI_CPU_CODECS)
        raise ConfigError(
            f"data.decoder=dali: DALI decodes only {', '.join(sorted(can))} on {where}, but {codecs[refused[0]]} is "
            f"{refused[0]}; set data.decoder=auto or pack it again with --codec vp9"
        )
    return "dali"
