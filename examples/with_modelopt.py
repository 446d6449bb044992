"""NVIDIA ModelOpt: its distillation mode with label revision, on scikit-learn's digits.

    python examples/with_modelopt.py

Needs nvidia-modelopt and scikit-learn; a few seconds on a CPU.
"""

from __future__ import annotations

from typing import Any

import modelopt.torch.distill as mtd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrds_fast.compat.modelopt import LogitsDistillationLoss
from lrds_fast.data import digits


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden, self.fc = nn.Linear(64, width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.hidden(x.flatten(1)).relu())
        return logits


torch.manual_seed(0)
images, target = digits()
order = torch.randperm(len(images))
images, target = images[order], target[order]
teacher = Net(128)
loss = LogitsDistillationLoss(4.0, "batchmean", revise="lr")
balancer = mtd.StaticLossBalancer(0.9)
config = {"teacher_model": teacher, "criterion": loss, "loss_balancer": balancer}
for name in ("teacher", "student"):
    model: Any = teacher if name == "teacher" else mtd.convert(Net(16), mode=[("kd_loss", config)])
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for rows in (rows for _ in range(8) for rows in torch.randperm(1500).split(64)):
        value = F.cross_entropy(model(images[rows]), target[rows])
        if name == "student":
            value = model.compute_kd_loss(student_loss=value, labels=target[rows])
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    model.eval()  # returns None in ModelOpt's model
    with torch.inference_mode():
        print(f"{name}: test accuracy {(model(images[1500:]).argmax(1) == target[1500:]).float().mean():.1%}")
