"""The loaders: the same global batch at any number of ranks, resume at any step, bad clips, prefetch, evaluation."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.synthetic_video import flat_video
from tools.shard.pack import PackOptions, pack
from vmjepa.config import load_pretrain
from vmjepa.data.clips import ClipSpec
from vmjepa.data.decode_dali import DaliDecoder
from vmjepa.data.decode_pyav import PyavDecoder
from vmjepa.data.eval_loader import eval_batches
from vmjepa.data.loader import ClipLoader, open_decoder, to_model_input, train_loader
from vmjepa.data.samples import Samples
from vmjepa.data.shards import ShardDataset, open_dataset
from vmjepa.errors import ConfigError, DataError

CLIPS, STEP = 12, 20  # video i is grey with value i * STEP and has label i
SPEC = ClipSpec(num_frames=4, stride=2, crop_size=16)


class MemoryDataset:
    """Videos in memory with a shard dataset's interface; two clips per shard; clips in `bad` hold garbage."""

    def __init__(self, bad: tuple[int, ...] = (), frames: int | None = None, counted: bool = True) -> None:
        self.data = [b"garbage" if i in bad else flat_video(i * STEP, frames or 12) for i in range(CLIPS)]
        self.labels = np.arange(CLIPS, dtype=np.int32)
        self.frames = np.full(CLIPS, 12 if counted else -1, np.int32)
        self.width, self.height = np.full(CLIPS, 32, np.int32), np.full(CLIPS, 24, np.int32)
        self.rotation = np.zeros(CLIPS, np.int32)
        self.shard_index = np.arange(CLIPS, dtype=np.int32) // 2
        self.shard_names = tuple("abcdef")
        self.reads = 0

    def __len__(self) -> int:
        return CLIPS

    def verify(self, i: int) -> None:
        pass

    def read(self, i: int) -> bytes:
        self.reads += 1
        return self.data[i]

    def describe(self, i: int) -> str:
        return f"clip {i}"

    def codec(self, i: int) -> str:
        return "mjpeg"


@pytest.fixture(scope="module")
def good() -> Samples:
    return Samples([MemoryDataset()])


@pytest.fixture(scope="module")
def csv(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for i in range(CLIPS):
        (folder / f"{i}.avi").write_bytes(flat_video(i * STEP))
    (folder / "clips.csv").write_text("".join(f"{i}.avi {i}\n" for i in range(CLIPS)))
    return folder / "clips.csv"


@pytest.fixture(scope="module")
def shards(csv, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "set"
    pack(csv, folder, PackOptions(shard_size=20_000))
    assert len(open_dataset(folder).shard_names) >= 3
    return folder


def loader(samples: Samples, spec: ClipSpec = SPEC, **options) -> ClipLoader:
    options = {"seed": 1, "batch_size": 4, "stop_step": 3, "window_groups": 2, "workers": 2, **options}
    return ClipLoader(samples, spec, PyavDecoder(spec.crop_size), **options)


def read_all(samples: Samples, **options) -> list:
    with loader(samples, **options) as batches:
        return list(batches)


def global_batch(batches: list) -> dict[int, tuple[torch.Tensor, torch.Tensor, list[str]]]:
    """By step: clips, labels and notes, micro-batches and ranks joined in their global order."""
    joined = {}
    for step in sorted({batch.step for batch in batches}):
        parts = [batch for batch in batches if batch.step == step]
        clips, labels = (torch.cat(list(x)) for x in zip(*((b.clips[0], b.labels) for b in parts), strict=True))
        joined[step] = clips, labels, [note for batch in parts for note in batch.replaced]
    return joined


def check_greys(clips: torch.Tensor, labels: torch.Tensor) -> None:
    """The pixels are those of the video with this label."""
    means = clips.float().mean((1, 2, 3, 4))
    assert (means - labels * STEP).abs().max() < 3


@pytest.mark.parametrize("bad", [(), (2, 3, 7)], ids=["all good", "bad clips"])
@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (2, 1), (4, 1), (1, 4), (2, 2)])
def test_global_batch_is_the_same_at_any_number_of_ranks(world, accumulation, bad):
    """8 videos per step, cut for 1, 2 and 4 ranks and micro-batches: the same clips, in the same places."""
    samples = Samples([MemoryDataset(bad)])
    expected = global_batch(read_all(samples, batch_size=8))
    size = 8 // (world * accumulation)
    ranks = [
        read_all(samples, batch_size=size, world=world, rank=rank, accumulation=accumulation) for rank in range(world)
    ]
    found = global_batch([batches[i] for i in range(3 * accumulation) for batches in ranks])
    assert list(found) == [0, 1, 2]
    for step, (clips, labels, notes) in found.items():
        assert torch.equal(clips, expected[step][0])
        assert torch.equal(labels, expected[step][1])
        assert notes == expected[step][2]
        check_greys(clips, labels)


@pytest.mark.parametrize("start", [1, 5, 9])
def test_resume_equals_the_unbroken_run(good, start):
    unbroken = read_all(good, stop_step=10)
    resumed = read_all(good, start_step=start, stop_step=10, workers=1)
    assert [batch.step for batch in resumed] == list(range(start, 10))
    for one, other in zip(resumed, unbroken[start:], strict=True):
        assert torch.equal(one.clips[0], other.clips[0])
        assert torch.equal(one.samples, other.samples)


def test_every_epoch_shows_every_clip_once_with_new_crops(good):
    batches = read_all(good, batch_size=4, stop_step=6)
    epochs = [torch.cat([batch.samples for batch in batches[first : first + 3]]) for first in (0, 3)]
    assert all(sorted(epoch.tolist()) == list(range(CLIPS)) for epoch in epochs)
    assert epochs[0].tolist() != epochs[1].tolist()


def test_batch_larger_than_the_dataset(good):
    (batch,) = read_all(good, batch_size=30, stop_step=1)
    assert batch.clips[0].shape == (30, 4, 16, 16, 3)
    assert np.bincount(batch.labels, minlength=CLIPS).tolist().count(2) >= CLIPS // 2


def test_several_clips_per_video(good):
    with loader(good, ClipSpec(num_frames=2, stride=1, crop_size=16, num_clips=3)) as batches:
        batch = next(batches)
    assert [tuple(clip.shape) for clip in batch.clips] == [(4, 2, 16, 16, 3)] * 3
    for clip in batch.clips:
        check_greys(clip, batch.labels)


def test_bad_clips_are_named_replaced_and_counted():
    samples = Samples([MemoryDataset(bad=(2, 3))])
    with loader(samples, batch_size=CLIPS, stop_step=1) as batches:
        (batch,) = batches
    assert sorted(batch.labels.tolist()) == [0, 1, 4, 4, 4, *range(5, CLIPS)]
    check_greys(batch.clips[0], batch.labels)
    # Sample 2 is replaced by 3, which fails too: three failures, two of them of clip 3.
    assert batches.bad == len(batch.replaced) == 3
    assert batches.loaded == CLIPS
    assert sum("clip 2 cannot be decoded (FFmpeg: Invalid data" in note for note in batch.replaced) == 1
    assert sum("clip 3 cannot" in note and note.endswith("clip 4 takes its place") for note in batch.replaced) == 2


def test_too_many_bad_clips_stop_the_run_for_good():
    samples = Samples([MemoryDataset(bad=(5,))])
    with loader(samples, batch_size=CLIPS, stop_step=None) as batches:
        with pytest.raises(
            DataError,
            match=r"rank 0 of 1: 11 of its 132 clips .* data.max_bad_fraction=0.01 allows.*clip 5 .*shard run",
        ):
            list(batches)
        with pytest.raises(DataError):  # not StopIteration, which would look like the end of the data
            next(batches)
    assert len(read_all(samples, batch_size=CLIPS, stop_step=12, max_bad_fraction=0.1)) == 12


def test_each_rank_judges_its_own_clips_at_the_same_batch_every_time():
    samples = Samples([MemoryDataset(bad=(5,))])

    def stop(rank: int) -> tuple[int, int, str]:
        batches = loader(samples, rank=rank, world=2, batch_size=6, stop_step=None, max_bad_fraction=0.005)
        with batches, pytest.raises(DataError) as error:
            list(batches)
        return batches.bad, batches.loaded, str(error.value)

    for rank in (0, 1):
        bad, loaded, message = stop(rank)
        assert bad == 6  # the first count above 0.005 of 1000 clips
        assert message.startswith(f"rank {rank} of 2: 6 of its {loaded} clips cannot be decoded")
        assert stop(rank) == (bad, loaded, message)


def test_no_decodable_clip_is_an_error():
    with pytest.raises(DataError, match=r"clip \d+ cannot be used .* nor can the 11 clips before it"):
        read_all(Samples([MemoryDataset(bad=tuple(range(CLIPS)))]))


def test_an_error_while_reading_reaches_the_caller(good, monkeypatch):
    def fail(self, sample):
        raise MemoryError("no memory for this clip")

    monkeypatch.setattr(Samples, "read", fail)
    with pytest.raises(MemoryError):
        read_all(good)


def decode_threads() -> int:
    return sum(thread.name.startswith("decode") for thread in threading.enumerate())


@pytest.mark.parametrize("how", ["early close", "end of data", "error"])
def test_threads_are_joined(good, how):
    assert decode_threads() == 0
    batches = loader(Samples([MemoryDataset(bad=tuple(range(CLIPS)))]) if how == "error" else good, workers=3)
    if how == "error":
        with pytest.raises(DataError):
            next(batches)
    elif how == "early close":
        next(batches)
        assert decode_threads() > 0
        batches.close()
    else:
        list(batches)
    assert decode_threads() == 0


def test_prefetch_runs_ahead_but_not_away():
    """While the consumer holds the first batch, exactly the next two are read."""
    data = MemoryDataset()
    with loader(Samples([data]), batch_size=8, stop_step=None) as batches:
        next(batches)
        deadline = time.monotonic() + 10
        while data.reads < 3 * 8 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert data.reads == 3 * 8


def test_waiting_is_measured(good):
    """Decoding takes 0.2 s per clip: the first batch is waited for, one that had time to get ready is not."""

    class SlowDecoder(PyavDecoder):
        def decode(self, jobs):
            time.sleep(0.2)
            return super().decode(jobs)

    with ClipLoader(good, SPEC, SlowDecoder(16), seed=1, batch_size=2, workers=2) as batches:
        next(batches)
        waited = batches.wait_seconds
        assert waited >= 0.2
        time.sleep(1.0)
        next(batches)
        assert batches.wait_seconds - waited < 0.1


def test_short_videos_are_filtered_or_extended():
    """Kept: the last frame is repeated. Left out: by the manifest where it counts frames, else when they are read."""
    mixed = MemoryDataset()
    mixed.frames[:4] = 3
    spec = ClipSpec(num_frames=4, stride=3, crop_size=16)
    assert len(Samples([mixed], min_frames=spec.span)) == CLIPS - 4
    assert len(Samples([mixed])) == CLIPS

    loose = MemoryDataset(counted=False)
    for i in range(4):
        loose.data[i] = flat_video(i * STEP, frames=3)
    with loader(Samples([loose], spec.span), spec, batch_size=CLIPS, stop_step=2, min_frames=spec.span) as batches:
        labels = torch.cat([batch.labels for batch in batches])
    assert labels.min() == 4
    assert batches.bad == 0
    kept = read_all(Samples([loose]), batch_size=CLIPS, stop_step=1)
    assert sorted(kept[0].labels.tolist()) == list(range(CLIPS))

    with pytest.raises(DataError, match="all 12 clips are shorter than 50 frames"):
        Samples([MemoryDataset()], min_frames=50)


def test_loose_file_with_fewer_frames_than_packets_is_planned_again(monkeypatch):
    """Packets promise 40 frames, 12 decode: the clip is cut from the 12, and is no bad clip."""
    from vmjepa.data import samples as module

    real = module.video_info
    monkeypatch.setattr(module, "video_info", lambda data: type(real(data))(40, 32, 24))
    with loader(Samples([MemoryDataset(counted=False)]), batch_size=CLIPS, stop_step=1) as batches:
        (batch,) = batches
    assert batches.bad == 0
    assert sorted(batch.labels.tolist()) == list(range(CLIPS))
    check_greys(batch.clips[0], batch.labels)


def test_csv_and_shards_are_read_alike(csv, shards):
    for path in (csv, shards):
        for batch in read_all(Samples([open_dataset(path)])):
            check_greys(batch.clips[0], batch.labels)
            assert not batch.replaced
    both = Samples([open_dataset(csv), open_dataset(shards)])
    labels = torch.cat([batch.labels for batch in read_all(both, batch_size=8)])
    assert np.bincount(labels).tolist() == [2] * CLIPS


def test_dali_loader_reads_the_same_clips(shards):
    """Whole batches through DALI, with a bad clip in their midst: the same samples as PyAV, pixels within 3 of 255."""
    pytest.importorskip("nvidia.dali")
    samples = Samples([open_dataset(shards)])
    decoder = open_decoder("dali", samples, SPEC.crop_size, 8, 1)
    assert isinstance(decoder, DaliDecoder)
    for data in (samples, Samples([MemoryDataset(bad=(4,))])):
        with ClipLoader(data, SPEC, decoder, seed=1, batch_size=8, stop_step=3, window_groups=2) as batches:
            dali = list(batches)
        for one, other in zip(dali, read_all(data, batch_size=8), strict=True):
            assert torch.equal(one.samples, other.samples)
            assert len(one.replaced) == len(other.replaced)
            assert (one.clips[0].float() - other.clips[0].float()).abs().mean() < 3


def test_changed_shard_bytes_are_an_error_not_a_replacement(shards, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in shards.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    dataset = ShardDataset(copy)
    tar = copy / dataset.shard_names[dataset.shard_index[3]]
    with open(tar, "r+b") as file:
        file.seek(int(dataset.offset[3]) + 100)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    message = rf"{tar.name} key {3:08d} .*do not match the manifest.*tools\.shard"
    with pytest.raises(DataError, match=message):
        read_all(Samples([dataset]), batch_size=CLIPS)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_evaluation_reads_every_clip_once(good, world):
    labels = []
    for rank in range(world):
        batches = eval_batches(
            good, SPEC, PyavDecoder(16), segments=2, views=3, batch_size=5, rank=rank, world=world, workers=2
        )
        for batch in batches:
            assert [clip.shape[1:] for clip in batch.clips] == [(4, 16, 16, 3)] * 6
            for clip in batch.clips:
                check_greys(clip, batch.labels)
            labels += batch.labels.tolist()
    assert labels == list(range(CLIPS))


def test_evaluation_names_a_clip_that_fails():
    batches = eval_batches(Samples([MemoryDataset(bad=(6,))]), SPEC, PyavDecoder(16), segments=1, views=1, batch_size=4)
    with pytest.raises(DataError, match=r"clip 6 cannot be decoded .*remove the clip"):
        list(batches)
    assert decode_threads() == 0


PRETRAIN = """
data: {{dataset_type: VideoDataset, datasets: [{csv}], batch_size: 3, num_frames: 4, tubelet_size: 2, sampling_rate: 2,
       crop_size: 16, patch_size: 8, num_workers: 1}}
logging: {{folder: {folder}}}
mask: [{{num_blocks: 1, spatial_scale: [0.5, 0.5]}}]
meta: {{seed: 5}}
model: {{model_name: vit_tiny}}
optimization: {{ipe: 2, epochs: 2, warmup: 0, start_lr: 1e-4, lr: 1e-3, final_lr: 1e-6}}
"""


@pytest.fixture
def config(csv, tmp_path):
    (tmp_path / "config.yaml").write_text(PRETRAIN.format(csv=csv, folder=tmp_path / "run"))
    return lambda *overrides: load_pretrain(tmp_path / "config.yaml", list(overrides))


def test_train_loader_follows_the_config(config, csv):
    cfg = config("optimization.accumulation_steps=2", "data_aug.horizontal_flip=false")
    with train_loader(cfg, [open_dataset(csv)], rank=1, world=2, start_step=1, device="cpu") as batches:
        found = [(batch.step, batch.micro, tuple(batch.clips[0].shape)) for batch in batches]
    assert found == [(step, micro, (3, 4, 16, 16, 3)) for step in (1, 2, 3) for micro in (0, 1)]


def test_train_loader_refuses_dali_for_loose_files(config, csv):
    pytest.importorskip("nvidia.dali")
    with pytest.raises(ConfigError, match=r"reads shards, not loose files \(.*clips.csv row 1: .*0.avi\)"):
        train_loader(config("data.decoder=dali"), [open_dataset(csv)], 0, 1, 0, "cpu")


def test_to_model_input_normalises():
    """Against the definitions, in float64; more leading sizes are joined."""
    clips = torch.randint(0, 256, (2, 3, 4, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    x = clips.flatten(0, 1).double().permute(0, 4, 1, 2, 3) / 255
    mean, std = (torch.tensor(v).double().view(3, 1, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    torch.testing.assert_close(to_model_input(clips, "imagenet").double(), (x - mean) / std, rtol=0, atol=1e-5)
    own = (x - x.mean((2, 3, 4), keepdim=True)) / x.std((2, 3, 4), correction=0, keepdim=True)
    torch.testing.assert_close(to_model_input(clips, "clip").double(), own, rtol=0, atol=1e-5)
    assert to_model_input(clips[0, 0], "imagenet", dtype=torch.bfloat16).shape == (1, 3, 4, 8, 8)
    assert (to_model_input(torch.full((1, 2, 4, 4, 3), 9, dtype=torch.uint8), "clip") == 0).all()
    with pytest.raises(ValueError, match="imagenet or clip"):
        to_model_input(clips, "none")
