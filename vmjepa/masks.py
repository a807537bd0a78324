"""Token sets: which tokens of each clip's grid a network sees or predicts."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TokenSet:
    """Tokens chosen per clip, as ascending raster indices (time, then row, then column).

    index: LongTensor (B, K). lengths: LongTensor (B,), or None where all K are real. Row b holds lengths[b] real
    indices first; the padded slots after them hold index 0.
    """

    index: torch.Tensor
    lengths: torch.Tensor | None = None

    def to(self, device: torch.device | str) -> TokenSet:
        """The same set on another device."""
        lengths = None if self.lengths is None else self.lengths.to(device)
        return TokenSet(self.index.to(device), lengths)

    def real(self) -> torch.Tensor | None:
        """Bool (B, K), True at real tokens; None where no slot is padded."""
        if self.lengths is None:
            return None
        slots = torch.arange(self.index.shape[1], device=self.index.device)
        return slots < self.lengths[:, None]
