"""Liger: its fused linear loss with label revision, on the bytes of this repository's documentation.

    python examples/with_liger.py

Networks that predict a byte from the eight before it. Needs liger-kernel; a few seconds on a CPU.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrds_fast.compat.liger import LigerFusedLinearJSDLoss

torch.manual_seed(0)
pages = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))
text = "".join(page.read_text(encoding="utf-8") for page in pages).encode("ascii", "replace")
windows = torch.tensor(list(text[:60000])).unfold(0, 9, 1)
windows = windows[torch.randperm(len(windows))]
inputs, labels = windows[:, :8], windows[:, 8]


def network(width: int) -> nn.Sequential:
    body = nn.Sequential(nn.Embedding(128, 16), nn.Flatten(), nn.Linear(128, width), nn.ReLU())
    return nn.Sequential(body, nn.Linear(width, 128, bias=False))


def train(model: nn.Sequential, teacher: nn.Sequential | None = None) -> float:
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for rows in torch.randperm(50000).split(256):
        loss = F.cross_entropy(model(inputs[rows]), labels[rows]) if teacher is None else distil(model, teacher, rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.inference_mode():
        return float((model(inputs[50000:]).argmax(1) == labels[50000:]).float().mean())


criterion = LigerFusedLinearJSDLoss(weight_hard_loss=0.5, weight_soft_loss=0.5, beta=0.5, revise="lr")


def distil(model: nn.Sequential, teacher: nn.Sequential, rows: Tensor) -> Tensor:
    """No logits of the batch are stored."""
    with torch.no_grad():
        taught = teacher[0](inputs[rows])
    loss: Tensor = criterion(model[0](inputs[rows]), model[1].weight, taught, teacher[1].weight, labels[rows])
    return loss


teacher = network(256)
print(f"teacher: test accuracy {train(teacher):.1%}")
print(f"student: test accuracy {train(network(32), teacher):.1%}")
