"""Makes the demo's labelled videos: real photographs seen by a moving camera, six camera motions, one per class.

    python -m tools.demo_videos demo/videos              # 11 training and 5 test pictures, 834 clips of 2 s
    python -m tools.demo_videos /tmp/small --train-clips 1 --test-clips 1

The photographs are files that ship inside scikit-image's package (nothing is downloaded). The class is the motion
alone, and no single frame gives it away:
- every picture appears in every class equally often, and no test picture is a training picture;
- a picture is continued by its mirror images, so the camera's position is uniform on a torus, and its angle is uniform
  on the circle: panning and turning leave both laws as they are, so *every* frame of these four classes has one
  distribution;
- a zoom has to change the scale, so scale is drawn for the middle of the clip, where all six classes agree exactly,
  from a range that is wide beside the zoom itself;
- every frame is coded by itself, so that compression does not blur moving pictures more than turning ones.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import av
import numpy as np
import torch
from rich.progress import track
from torch.nn import functional as F

from vmjepa.errors import DataError, UserError, handle_errors, storage_error

# Real pictures with something to see nearly everywhere; scenes and plain textures on both sides of the split.
TRAIN_PICTURES = (
    "astronaut.png", "brick.png", "coffee.png", "grass.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "page.png",
    "retina.jpg", "rocket.jpg", "text.png",
)  # fmt: skip
WORTH_SEEING = {"retina.jpg": 0.68}  # share of width and height around the centre; the rest is black
TEST_PICTURES = ("camera.png", "chelsea.png", "coins.png", "gravel.png", "motorcycle_left.png")

CLASSES = ("pan_left", "pan_right", "rotate_clockwise", "rotate_counterclockwise", "zoom_in", "zoom_out")

PAN = (0.25, 0.75)  # way over the whole clip, in frame widths
ZOOM = (1.3, 2.0)  # scale factor over the whole clip
TURN = (20.0, 70.0)  # degrees over the whole clip
VIEW = (0.25, 0.65)  # side of the camera's view at mid-clip, in short sides of the picture
SUMMARY = "clips.json"


@dataclass(frozen=True)
class Camera:
    """Where the camera looks, frame by frame: arrays of shape (frames,), in picture pixels and radians."""

    x: np.ndarray
    y: np.ndarray
    angle: np.ndarray
    view: np.ndarray  # side of the square that fills the frame

    @staticmethod
    def moving(motion: str, frames: int, width: int, height: int, rng: np.random.Generator) -> Camera:
        """A camera over a picture of width x height pixels. The same draws are made in the same order for every motion,
        so that clips of two classes with one generator state differ by nothing but the motion.
        """
        x, y = rng.uniform(0, 2 * width), rng.uniform(0, 2 * height)  # one period of the mirrored picture
        angle = rng.uniform(0, 2 * math.pi)
        view = math.exp(rng.uniform(*np.log(VIEW))) * min(width, height)
        pan, zoom, turn = rng.uniform(*PAN), math.exp(rng.uniform(*np.log(ZOOM))), math.radians(rng.uniform(*TURN))
        time = np.linspace(-0.5, 0.5, frames)  # 0 at mid-clip
        still = np.zeros(frames)
        along, turned, scaled = {
            "pan_left": (-pan * time, still, still),
            "pan_right": (pan * time, still, still),
            "rotate_clockwise": (still, turn * time, still),
            "rotate_counterclockwise": (still, -turn * time, still),
            "zoom_in": (still, still, -math.log(zoom) * time),
            "zoom_out": (still, still, math.log(zoom) * time),
        }[motion]
        # A pan follows the frame's own horizontal axis, whichever way the camera is turned.
        return Camera(
            x=x + along * view * math.cos(angle),
            y=y + along * view * math.sin(angle),
            angle=angle + turned,
            view=view * np.exp(scaled),
        )


@dataclass(frozen=True)
class Clip:
    """One file of the set: `path` is relative to the set's folder, `ordinal` fixes its random numbers."""

    path: str
    motion: str
    picture: str
    ordinal: int


def plan(train_clips: int, test_clips: int) -> list[Clip]:
    """Every picture in every class, `train_clips` or `test_clips` times."""
    clips: list[Clip] = []
    for part, pictures, repeats in (("train", TRAIN_PICTURES, train_clips), ("test", TEST_PICTURES, test_clips)):
        for picture in pictures:
            for repeat in range(repeats):
                for motion in CLASSES:
                    path = f"{part}/{motion}/{Path(picture).stem}_{repeat:02d}.mp4"
                    clips.append(Clip(path, motion, picture, len(clips)))
    return clips


@cache
def load_picture(name: str) -> list[torch.Tensor]:
    """The picture and its halvings, each (3, height, width) float in [0, 255]; DataError when it is not installed."""
    import skimage.data
    from skimage.io import imread

    path = Path(skimage.data.__file__).parent / name
    if not path.is_file():
        raise DataError(f"{path}: not in this scikit-image; install the version pinned in containers/")
    pixels = np.atleast_3d(imread(path))[..., :3]
    top, left = (int(side * (1 - WORTH_SEEING.get(name, 1.0)) / 2) for side in pixels.shape[:2])
    pixels = pixels[top : pixels.shape[0] - top, left : pixels.shape[1] - left]
    levels = [torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).float().expand(3, -1, -1).contiguous()]
    while min(levels[-1].shape[1:]) >= 128:
        levels.append(F.avg_pool2d(levels[-1], 2, ceil_mode=True))
    return levels


def render(levels: list[torch.Tensor], camera: Camera, size: int) -> np.ndarray:
    """What the camera sees: uint8 (frames, size, size, 3). Sampled at twice the resolution, against aliasing."""
    fine = 2 * size
    middle = camera.view[len(camera.view) // 2]
    level = min(len(levels) - 1, max(0, math.floor(math.log2(max(1.0, middle / fine)))))
    picture, shrink = levels[level], 2.0**level
    axis = (torch.arange(fine) + 0.5) / fine - 0.5  # position in the frame, in frame widths
    down, right = torch.meshgrid(axis, axis, indexing="ij")
    angle, view = torch.from_numpy(camera.angle).float(), torch.from_numpy(camera.view).float() / shrink
    cos, sin = (torch.cos(angle) * view)[:, None, None], (torch.sin(angle) * view)[:, None, None]
    x = torch.from_numpy(camera.x).float()[:, None, None] / shrink + cos * right - sin * down
    y = torch.from_numpy(camera.y).float()[:, None, None] / shrink + sin * right + cos * down
    height, width = picture.shape[1:]
    grid = torch.stack([2 * x / width - 1, 2 * y / height - 1], dim=-1)  # reflected at the picture's borders
    frames = F.grid_sample(
        picture.expand(len(grid), -1, -1, -1), grid, mode="bilinear", padding_mode="reflection", align_corners=False
    )
    return F.avg_pool2d(frames, 2).round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous().numpy()


def encode(frames: np.ndarray, fps: int) -> bytes:
    """An mp4 file (h264, every frame a key frame) of uint8 frames (frames, height, width, 3)."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1  # the same bytes on every machine
        stream.options = {"crf": "20", "preset": "veryfast", "g": "1", "bf": "0"}
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def make_clip(clip: Clip, seed: int, frames: int, size: int) -> np.ndarray:
    """The clip's frames, uint8 (frames, size, size, 3): a function of (seed, clip) alone."""
    levels = load_picture(clip.picture)
    rng = np.random.Generator(np.random.Philox(key=[seed, clip.ordinal]))
    height, width = levels[0].shape[1:]
    return render(levels, Camera.moving(clip.motion, frames, width, height, rng), size)


def make(out: Path, train_clips: int, test_clips: int, frames: int, size: int, fps: int, seed: int) -> int:
    """Writes the set to the new folder `out` (complete or not at all) and returns its number of clips."""
    if out.exists():
        raise UserError(f"{out} exists already; remove it or choose another folder for the demo's videos")
    clips = plan(train_clips, test_clips)
    unfinished = out.with_name(out.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    for folder in sorted({(unfinished / clip.path).parent for clip in clips}):
        folder.mkdir(parents=True)

    def write(clip: Clip) -> None:
        (unfinished / clip.path).write_bytes(encode(make_clip(clip, seed, frames, size), fps))

    torch.set_num_threads(1)  # the clips themselves are made in parallel
    for picture in TRAIN_PICTURES + TEST_PICTURES:
        load_picture(picture)  # before the threads ask for it
    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for _ in track(pool.map(write, clips), description="making clips", total=len(clips)):
                pass
        options = {"frames": frames, "size": size, "fps": fps, "seed": seed}
        summary = {**options, "classes": CLASSES, "clips": [asdict(clip) for clip in clips]}
        (unfinished / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n")
        unfinished.rename(out)
    except OSError as error:
        raise storage_error(error, f"writing the demo's videos to {out}") from error
    return len(clips)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="new folder; gets train/CLASS/*.mp4, test/CLASS/*.mp4 and clips.json")
    parser.add_argument("--train-clips", type=int, default=9, help="clips per training picture and class")
    parser.add_argument("--test-clips", type=int, default=8, help="clips per test picture and class")
    parser.add_argument("--frames", type=int, default=24, help="frames per clip")
    parser.add_argument("--size", type=int, default=112, help="side of the square frame in pixels, even")
    parser.add_argument("--fps", type=int, default=12, help="frames per second")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other camera paths")
    arguments = parser.parse_args()
    with handle_errors():
        if arguments.size % 2 or min(arguments.size, arguments.frames, arguments.fps) < 2:
            raise UserError("--size, --frames and --fps must be at least 2, and --size even, which h264 asks for")
        if min(arguments.train_clips, arguments.test_clips) < 1:
            raise UserError("--train-clips and --test-clips must be at least 1")
        count = make(**vars(arguments))
        print(f"{count} clips of {len(CLASSES)} camera motions in {arguments.out}")


if __name__ == "__main__":
    main()
