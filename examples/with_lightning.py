"""Lightning: a module that distils a teacher, on scikit-learn's digits.

    python examples/with_lightning.py

Needs lightning and scikit-learn; a few seconds on a CPU.
"""

from __future__ import annotations

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lrds_fast.compat.lightning import LRDSDistillation
from lrds_fast.data import digits


class Teacher(lightning.LightningModule):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=5e-3)


class Student(LRDSDistillation, Teacher):
    def __init__(self, width: int, teacher: nn.Module) -> None:
        super().__init__(width)
        self.distil(teacher, temperature=4.0)


torch.manual_seed(0)
images, target = digits()
order = torch.randperm(len(images))
images, target = images[order], target[order]
loader = DataLoader(TensorDataset(images[:1500], target[:1500]), batch_size=64, shuffle=True)
teacher = Teacher(128)
for name in ("teacher", "student"):
    model = teacher if name == "teacher" else Student(16, teacher)
    silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    lightning.Trainer(max_epochs=8, accelerator="cpu", **silent).fit(model, loader)
    with torch.inference_mode():
        print(f"{name}: test accuracy {(model.eval()(images[1500:]).argmax(1) == target[1500:]).float().mean():.1%}")
