"""Multi-block masks against V-JEPA's collator.

The exact part replays the official order of random calls through our block sizes, unions and truncation; the
statistical part draws with our own generator and compares what it does to every position of the grid.
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vmjepa.masks import block_size, draw_mask, draw_targets, keep_cells, target_cells, token_set


@pytest.fixture(scope="module")
def vectors(golden_dir):
    return np.load(golden_dir / "masks.npz")


def geometries(vectors):
    for name, config in json.loads(str(vectors["config_json"])).items():
        side = config["crop"] // config["patch"]
        yield name, config, (config["frames"] // config["tubelet"], side, side)


def official_size(spec, grid, call: int):
    generator = torch.Generator().manual_seed(call)
    return block_size(spec, grid, np.array([torch.rand(1, generator=generator).item() for _ in range(3)]))


def official_targets(spec, grid, size, batch: int) -> np.ndarray:
    """Places blocks with the global torch generator in the official order: top, left, start, block by block."""
    rows = []
    while len(rows) < batch:
        corners = []
        for _ in range(spec.num_blocks):
            top = torch.randint(0, grid[1] - size[1] + 1, (1,)).item()
            left = torch.randint(0, grid[2] - size[2] + 1, (1,)).item()
            start = torch.randint(0, grid[0] - size[0] + 1, (1,)).item()
            corners.append((start, top, left))
        cells = target_cells(spec, grid, size, np.array([corners]))[0]
        if not cells.all():
            rows.append(cells)
    return np.stack(rows)


def test_exact_lists_of_consecutive_calls(vectors):
    """Same random numbers in, same index lists out, after truncation."""
    for name, config, grid in geometries(vectors):
        torch.manual_seed(config["global_seed"] + 50)
        calls = len({key.split("/")[2] for key in vectors.files if key.startswith(f"{name}/exact/")})
        for call in range(calls):
            for number, entry in enumerate(config["mask_cfgs"]):
                spec = SimpleNamespace(**entry)
                expected = {part: vectors[f"{name}/exact/call{call}/cfg{number}/{part}"] for part in ("enc", "pred")}
                size = official_size(spec, grid, call)
                target = official_targets(spec, grid, size, len(expected["enc"]))
                for part, cells in (("enc", ~target), ("pred", target)):
                    ours = token_set(keep_cells(cells, int(cells.sum(axis=1).min()), None))
                    assert ours.lengths is None
                    np.testing.assert_array_equal(ours.index.numpy(), expected[part], err_msg=f"{name} {call} {part}")


def test_block_sizes_of_stored_seeds(vectors):
    for name, config, grid in geometries(vectors):
        for number, entry in enumerate(config["mask_cfgs"]):
            stored = vectors[f"{name}/cfg{number}/block_size_seed0_199"]
            ours = [official_size(SimpleNamespace(**entry), grid, seed) for seed in range(len(stored))]
            np.testing.assert_array_equal(ours, stored)


def test_own_draws_follow_the_official_distribution(vectors):
    """As many draws as were stored: means within 5 combined standard errors, every cell within the stated tolerance."""
    for name, config, grid in geometries(vectors):
        for number, entry in enumerate(config["mask_cfgs"]):
            spec, prefix = SimpleNamespace(**entry), f"{name}/cfg{number}"
            stored = vectors[f"{prefix}/single/n_tgt"].astype(float)
            ours = np.stack([draw_targets(spec, grid, 1, 7, step, number)[0] for step in range(len(stored))])
            counts = ours.sum(axis=1)
            error = np.hypot(counts.std(), stored.std()) / len(stored) ** 0.5
            assert abs(counts.mean() - stored.mean()) < 5 * error
            assert np.abs(ours.mean(axis=0) - vectors[f"{prefix}/single/p_target"].ravel()).max() < 0.06

            samples = config["stats"][f"cfg{number}"]["batch_size"]
            calls = range(len(vectors[f"{prefix}/batch/n_ctx"]))
            batches = [draw_mask(spec, grid, samples, 7, step, number, "prefix") for step in calls]
            for part, key in (("context", "p_context"), ("target", "p_target")):
                share = np.mean([getattr(batch, part).mean(axis=0) for batch in batches], axis=0)
                assert np.abs(share - vectors[f"{prefix}/batch/{key}"].ravel()).max() < 0.15
