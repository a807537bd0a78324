"""The objective and its health signals: the global batch may be cut in any way."""

from __future__ import annotations

import pytest
import torch

from tests import engine_worker as worker
from vmjepa.jepa import JEPA, target_features
from vmjepa.run_dir import RunDir
from vmjepa.train.metrics import keep_steps_before, rank_me, target_ranks


@pytest.mark.parametrize("reg_coeff", [0.0, 1.0], ids=["plain", "variance-term"])
@pytest.mark.parametrize("parts", [2, 4, 8], ids=lambda parts: f"{parts}-parts")
def test_shares_of_any_cut_add_up(parts, reg_coeff):
    """Loss and gradients of the whole batch equal the sums over micro-batches, with unequal mask lengths, in fp64."""
    torch.manual_seed(0)
    model = JEPA(worker.Encoder(), worker.Predictor(), reg_coeff=reg_coeff).double()
    clips, counts = worker.batch(0)
    clips, total = clips.double(), int(counts.sum())

    def gradients(cut: int) -> tuple[torch.Tensor, torch.Tensor]:
        model.zero_grad()
        loss = torch.zeros((), dtype=torch.float64)
        for rows in torch.arange(len(clips)).chunk(cut):
            features = target_features(model.encoder, clips[rows]).double()
            part, _, _ = model(clips[rows], worker.masks_of(counts[rows], total), features)
            part.backward()
            loss += part.detach()
        return loss, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    whole, cut = gradients(1), gradients(parts)
    torch.testing.assert_close(cut[0], whole[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(cut[1], whole[1], rtol=1e-5, atol=1e-9)


def test_rank_counts_directions():
    """Features along k directions of equal strength have rank k; a clip alone has no content rank."""
    directions = torch.eye(16)[:5].repeat(20, 1)
    assert rank_me(directions) == pytest.approx(5, rel=1e-6)
    assert target_ranks(torch.randn(1, 30, 8)).keys() == {"rank"}
    position_only = torch.randn(1, 30, 8).expand(4, -1, -1) + 0.01 * torch.randn(4, 30, 1)
    assert target_ranks(position_only)["rank_content"] < 1.5 < target_ranks(position_only)["rank"]


def test_lines_of_steps_to_be_done_again_are_dropped(tmp_path):
    """Half lines, foreign bytes and lines without a step go too; the rest stays as it was."""
    run = RunDir(tmp_path)
    run.metrics.write_bytes(b'{"step": 1, "loss": 2}\n{"loss": 1}\n[]\n\xff\n{"step": 2, "loss": 1}\n{"step": 3, "lo')
    keep_steps_before(run.metrics, 1)
    assert run.metrics.read_text() == '{"step": 1, "loss": 2}\n'
