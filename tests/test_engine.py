"""The DeepSpeed engine at every ZeRO stage, on two ranks, against a plain single-process AdamW loop."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch

from tests import engine_worker as worker
from tests.conftest import ROOT
from vmjepa.jepa import target_features


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Results of all stages, on two ranks."""
    out = tmp_path_factory.mktemp("engine") / "results.pt"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*command, "-m", "tests.engine_worker", str(out)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return torch.load(out, weights_only=True)


@pytest.fixture(scope="module")
def reference():
    """The same steps in plain PyTorch: whole batch, torch's own clipping per module, AdamW, EMA."""
    model = worker.build()
    target = copy.deepcopy(model.encoder)
    groups = [
        {"params": [p for n, p in model.named_parameters() if worker.decays(n, p) == flag], "flag": flag}
        for flag in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)
    log = []
    for step in range(worker.STEPS):
        clips, counts = worker.batch(step)
        loss, _, _ = model(clips, worker.masks_of(counts, int(counts.sum())), target_features(target, clips))
        optimizer.zero_grad()
        loss.backward()
        norms = [
            torch.nn.utils.clip_grad_norm_(getattr(model, name).parameters(), limit).item()
            for name, limit in worker.LIMITS.items()
        ]
        for group in optimizer.param_groups:
            group.update(lr=0.01 * (step + 1), weight_decay=0.1 if group["flag"] else 0.0)
        optimizer.step()
        with torch.no_grad():
            for theirs, ours in zip(target.parameters(), model.encoder.parameters(), strict=True):
                theirs.mul_(0.9).add_(0.1 * ours)
        log.append([loss.item(), *norms])
    return {"log": log, "model": model.state_dict(), "target": target.state_dict()}


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4), ids=lambda stage: f"zero{stage}")
def test_stage_matches_plain_adamw(trained, reference, stage):
    """Losses, norms before clipping, weights and EMA target after four accumulated, clipped steps."""
    torch.testing.assert_close(
        torch.tensor(trained[stage]["log"]), torch.tensor(reference["log"]), rtol=2e-6, atol=1e-7
    )
    for part in ("model", "target"):
        for name, value in reference[part].items():
            torch.testing.assert_close(trained[stage][part][name], value, rtol=1e-5, atol=1e-6, msg=f"{part} {name}")
    assert min(norm for _, *norms in reference["log"] for norm in norms[:1]) > worker.LIMITS["encoder"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4), ids=lambda stage: f"zero{stage}-to-{(stage + 1) % 4}")
def test_state_moves_between_stages(trained, stage):
    """Saved at one stage half way and continued at another, the run goes on as if unbroken."""
    result = trained[stage]
    torch.testing.assert_close(torch.tensor(result["moved_log"]), torch.tensor(result["log"]), rtol=2e-6, atol=1e-7)
    for name, value in result["model"].items():
        torch.testing.assert_close(result["moved_model"][name], value, rtol=1e-5, atol=1e-6, msg=name)
