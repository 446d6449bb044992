"""RepDistiller: its sum of a cross-entropy and criterion_div, with label revision, on scikit-learn's digits.

    python examples/with_repdistiller.py

Needs scikit-learn; a few seconds on a CPU.
"""

from __future__ import annotations

import torch
from torch import nn

from lrds_fast.compat.repdistiller import DistillKL
from lrds_fast.data import digits

torch.manual_seed(0)
images, target = digits()
order = torch.randperm(len(images))
images, target = images[order].flatten(1), target[order]
teacher = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
student = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
criterion_cls, criterion_div = nn.CrossEntropyLoss(), DistillKL(4.0, revise="lr")
for name, model in (("teacher", teacher), ("student", student)):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for rows in (rows for _ in range(10) for rows in torch.randperm(1500).split(64)):
        logit_s = model(images[rows])
        loss = criterion_cls(logit_s, target[rows])
        if model is student:
            with torch.no_grad():
                logit_t = teacher(images[rows])
            loss = 0.1 * loss + 0.9 * criterion_div(logit_s, logit_t, target[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.inference_mode():
        print(f"{name}: test accuracy {(model(images[1500:]).argmax(1) == target[1500:]).float().mean():.1%}")
