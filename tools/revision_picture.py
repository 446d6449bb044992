"""Draws docs/revision.svg: one wrong row of a teacher before and after label revision, at T = 1 and T = 4.

python tools/revision_picture.py [PATH]

The row is made up after published CIFAR-100 networks: 100 classes, at T = 4 about .12 for the wrong top class, at T = 1
.94 for the label of a right row. Needs matplotlib, which is in the extra "bench".
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lrds_fast import reference

PATH = Path(__file__).resolve().parent.parent / "docs" / "revision.svg"
SHOWN = ("wrong\ntop", "label", "3rd", "4th", "5th", "6th", "7th")
LABEL = 1
# Distinct in print and to most colour-blind readers (Okabe and Ito).
BARS = (
    ("the teacher's p", None, "#999999"),
    ("p' as published: revised at T", "T", "#d55e00"),
    ("p' with revise_temperature=1", 1.0, "#0072b2"),
)


def row() -> Tensor:
    """(1, 100) logits, largest first: a top class, the label close behind it, a few alternatives, and the rest."""
    first = torch.tensor([9.2, 7.8, 6.0, 5.0, 4.2, 3.6, 3.0], dtype=torch.float64)
    return torch.cat([first, torch.linspace(1.0, -7.0, 93, dtype=torch.float64)])[None]


def right_row() -> Tensor:
    """(1, 100) logits of a row as right rows usually are: the label first, well ahead."""
    first = torch.tensor([10.8, 7.8, 6.0, 5.0, 4.2, 3.6, 3.0], dtype=torch.float64)
    return torch.cat([first, torch.linspace(1.0, -7.0, 93, dtype=torch.float64)])[None]


def probabilities(temperature: float, revise: str | float | None) -> Tensor:
    """(100,) of the wrong row at `temperature`: unrevised (None), revised there ("T"), or revised at a number."""
    if revise is None:
        return torch.softmax(row() / temperature, dim=-1)[0]
    at = None if revise == "T" else float(revise)
    return reference.revise_labels(row(), torch.tensor([LABEL]), temperature=temperature, revise_temperature=at)[0]


def draw(path: Path) -> None:
    """Writes the picture."""
    matplotlib.rcParams["svg.hashsalt"] = "lrds-fast"
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.4))
    for panel, temperature in zip(panels, (1.0, 4.0), strict=True):
        for i, (name, revise, colour) in enumerate(BARS):
            p = probabilities(temperature, revise)[: len(SHOWN)]
            bars = panel.bar([k + 0.28 * (i - 1) for k in range(len(SHOWN))], p, 0.26, color=colour, label=name)
            texts = [f"{x:.2f}"[1:] if k <= LABEL else "" for k, x in enumerate(p.tolist())]
            panel.bar_label(bars, texts, fontsize=7)
        right = torch.softmax(right_row() / temperature, dim=-1)[0, 0].item()
        panel.axhline(right, color="#000000", linewidth=0.8, linestyle="--", label="p of the label, a right row")
        panel.set_xticks(range(len(SHOWN)), SHOWN, fontsize=8)
        panel.set_title(f"T = {temperature:g}", fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("probability")
    panels[1].legend(fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else PATH)
