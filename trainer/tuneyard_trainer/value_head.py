"""What PPO expects of an answer so far: one number per position, read off the policy's own states.

Policy and value share a trunk (Schulman et al. 2017, section 5, eq. 9), so there is no second model
in memory and an adapter serves both. Shapes: N positions, H hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ValueHead(nn.Module):
    """V(s) = w h + b, in float32 whatever the trunk computes in: returns differ in the digits that
    bfloat16 does not have.

    It starts at zero, so that the first update's advantages are those of no critic at all instead
    of a random one's.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 1, device=device, dtype=torch.float32)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden_NH: Tensor) -> Tensor:
        """(N,) values; `hidden_NH`: what the model's own head sees."""
        with torch.autocast(hidden_NH.device.type, enabled=False):
            values_N1: Tensor = self.linear(hidden_NH.float())
        return values_N1.squeeze(-1)
