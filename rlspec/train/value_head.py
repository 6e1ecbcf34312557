"""The critic of PPO: one linear unit on the model's last hidden state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class ValueHead(nn.Module):
    """Maps hidden states (…, H) to values (…,) float32, whatever precision the model runs in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 1, dtype=torch.float32)
        # Zero weights: at first every state has the same value, and no gradient flows into the model yet.
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    @classmethod
    def for_model(cls, model: Any) -> ValueHead:
        """A fresh head that fits a causal language model, on its device."""
        output = model.get_output_embeddings().weight
        return cls(output.shape[1]).to(output.device)

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return self.linear(hidden.float())[..., 0]

    @torch.no_grad()
    def start_at(self, value: float) -> None:
        """Predict this value everywhere."""
        self.linear.bias.fill_(value)
