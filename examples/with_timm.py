"""timm: its distillation task with label revision, on scikit-learn's digits with a tiny ViT.

    python examples/with_timm.py

Needs timm and scikit-learn; a quarter of a minute on a CPU.
"""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.task import ClassificationTask

from lrds_fast.compat.timm import LRDSDistillationTask
from lrds_fast.data import digits

torch.manual_seed(0)
images, target = digits()
order = torch.randperm(len(images))
images, target = (images[order].expand(-1, 3, -1, -1) - 0.5) / 0.5, target[order]  # normalised as the ViT expects


def vit(width: int, depth: int) -> torch.nn.Module:
    sizes: dict[str, Any] = {"img_size": 8, "patch_size": 2, "embed_dim": width, "depth": depth, "num_heads": 2}
    sizes["num_classes"] = 10
    model: torch.nn.Module = timm.create_model("test_vit", **sizes)
    return model


def train(task: torch.nn.Module, model: torch.nn.Module, epochs: int) -> float:
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(epochs):
        for rows in torch.randperm(1500).split(100):
            optimizer.zero_grad()
            task(images[rows], target[rows])["loss"].backward()
            optimizer.step()
    with torch.inference_mode():
        return float((model.eval()(images[1500:]).argmax(1) == target[1500:]).float().mean())


teacher, student = vit(32, 2), vit(32, 1)
alone = ClassificationTask(teacher, torch.nn.CrossEntropyLoss(), verbose=False)
print(f"teacher: test accuracy {train(alone, teacher, 10):.1%}")
task = LRDSDistillationTask(student, teacher, task_loss_weight=0.1, temperature=4.0, revise="lr", verbose=False)
print(f"student: test accuracy {train(task, student, 10):.1%}")
