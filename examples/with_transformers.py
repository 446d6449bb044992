"""transformers: its Trainer with a teacher, on the bytes of this repository's documentation.

    python examples/with_transformers.py

Tiny Llamas with random weights. Needs transformers[torch]; a quarter of a minute on a CPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from lrds_fast import KDLoss
from lrds_fast.compat.transformers import LRDSTrainer

torch.manual_seed(0)
pages = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))
text = "".join(page.read_text(encoding="utf-8") for page in pages).encode("ascii", "replace")
tokens = torch.tensor(list(text[:65536])).view(-1, 64)
data = [{"input_ids": row, "labels": row} for row in tokens[:960]]


def model(width: int) -> Any:
    sizes = {"vocab_size": 128, "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))


def arguments(epochs: int) -> Any:
    own = {"num_train_epochs": epochs, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    return TrainingArguments("out", **own, learning_rate=1e-2, report_to=[], save_strategy="no", use_cpu=True)


def accuracy(student: Any) -> float:
    with torch.inference_mode():
        predicted = student.eval()(tokens[960:]).logits[:, :-1].argmax(-1)
    return float((predicted == tokens[960:, 1:]).float().mean())


teacher, student = model(64), model(32)
Trainer(teacher, arguments(3), train_dataset=data).train()
print(f"teacher: test accuracy {accuracy(teacher):.1%}")
loss = KDLoss(temperature=2.0, ce_weight=0.5, kd_weight=0.5)
LRDSTrainer(student, arguments(3), train_dataset=data, teacher=teacher, loss=loss).train()
print(f"student: test accuracy {accuracy(student):.1%}")
