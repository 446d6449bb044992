"""kd_loss in a plain PyTorch loop: the one line that distillation adds, with and without label revision.

    python examples/drop_in.py

Real digits (scikit-learn's, 8 x 8), a teacher trained on labels of which a third are wrong, a student with correct
ones. Needs scikit-learn; runs in seconds on a CPU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lrds_fast import kd_loss


def network(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


def train(
    model: nn.Module, images: Tensor, target: Tensor, *, teacher: nn.Module | None = None, revise: str | None = None
) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(60):
        for batch in torch.randperm(len(images)).split(64):
            logits = model(images[batch])
            if teacher is None:
                loss = F.cross_entropy(logits, target[batch])
            else:
                with torch.inference_mode():
                    teacher_logits = teacher(images[batch])
                loss = kd_loss(logits, teacher_logits, target[batch], temperature=4.0, revise=revise)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def accuracy(model: nn.Module, images: Tensor, target: Tensor) -> float:
    with torch.inference_mode():
        return float((model(images).argmax(dim=1) == target).float().mean())


def main() -> None:
    torch.manual_seed(0)
    bunch = load_digits()
    order = torch.randperm(len(bunch.target))
    images = torch.from_numpy(bunch.data / 16.0).float()[order]
    target = torch.from_numpy(bunch.target).long()[order]
    train_images, test_images = images[:1200], images[1200:]
    train_target, test_target = target[:1200], target[1200:]

    wrong = torch.rand(1200) < 1 / 3
    noisy = torch.where(wrong, (train_target + torch.randint(1, 10, (1200,))) % 10, train_target)
    teacher = network(256)
    train(teacher, train_images, noisy)
    teacher.eval()
    mistaken = 1 - accuracy(teacher, train_images, train_target)
    reached = accuracy(teacher, test_images, test_target)
    print(f"teacher: test accuracy {reached:.1%}, wrong on {mistaken:.1%} of what the students learn from")

    for name, revise in (("KD", None), ("KD + LR", "lr")):
        torch.manual_seed(1)
        student = network(32)
        train(student, train_images, train_target, teacher=teacher, revise=revise)
        print(f"{name:8s} student: test accuracy {accuracy(student, test_images, test_target):.1%}")


if __name__ == "__main__":
    main()
