"""kd_loss of DTensors: rows shared by two processes give the numbers of one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import os, sys
import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # before there is a group: see lrds_fast.ranks
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

from lrds_fast import KDLoss, kd_loss, kd_loss_parts, linear_kd_loss

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
draws = torch.Generator().manual_seed(0)
z, v = (3 * torch.randn(6, 5, 7, generator=draws, dtype=torch.float64) for _ in range(2))
y = torch.randint(7, (6, 5), generator=draws)
y[0] = y[1, :3] = -100  # the processes have different numbers of valid rows
selected = torch.arange(30).view(6, 5) % 3 > 0
weight = torch.linspace(0.5, 2.0, 7, dtype=torch.float64)


def shard(tensor, placement):
    return distribute_tensor(tensor, mesh, [placement])


for placement in (Shard(0), Shard(1), Shard(-3), Replicate()):
    for options in (
        {}, {"reduction": "sum"}, {"reduction": "none"}, {"reduction": "elementmean", "divergence": "dkd"},
        {"selected": selected}, {"class_weight": weight}, {"target": None, "ce_weight": 0.0, "revise": None},
        {"num_valid": 9.0}, {"classes": "truncate", "softcap": 5.0},
    ):
        given = {"target": y} | options
        leaf = z.clone().requires_grad_()
        expected = kd_loss(leaf, v, **given)
        (gradient,) = torch.autograd.grad(expected.sum(), leaf)
        sharded = shard(z, placement).requires_grad_()
        for name in ("target", "selected"):
            if given.get(name) is not None:
                given[name] = shard(given[name], Shard(0) if placement == Shard(-3) else placement)
        # The teacher may be placed otherwise: it is moved.
        loss = kd_loss(sharded, shard(v, Replicate()), **given)
        assert isinstance(loss, DTensor)
        torch.testing.assert_close(loss.full_tensor(), expected.detach())
        loss.sum().backward()
        assert sharded.grad.placements == sharded.placements
        torch.testing.assert_close(sharded.grad.full_tensor(), gradient)
        parts = kd_loss_parts(sharded, shard(v, placement), **given)
        wanted = kd_loss_parts(z, v, **{"target": y} | options)
        for found, exact in zip(parts, wanted, strict=True):
            torch.testing.assert_close(found.full_tensor(), exact)


# A sum over a DTensor target is a DTensor whose terms are not added up.
first = [shard(tensor, Shard(0)) for tensor in (z, v, y)]
counted = kd_loss(*first, num_valid=(first[2] != -100).sum())
torch.testing.assert_close(counted.full_tensor(), kd_loss(z, v, y))


def refused(message, function, *arguments, **options):
    try:
        function(*arguments, **options)
    except (TypeError, ValueError) as error:
        assert message in str(error), error
    else:
        raise AssertionError(message)


rows, labels = shard(z, Shard(0)), shard(y, Shard(0))
refused("student_logits.full_tensor()", kd_loss, shard(z, Shard(2)), rows, labels)
refused("teacher_logits.full_tensor()", kd_loss, rows, shard(v, Shard(-1)), labels)
refused("target must be a DTensor like student_logits; got Tensor", kd_loss, rows, rows, y)
refused("student_logits must be a DTensor", kd_loss, z, rows, labels)
refused("student_logits must be a DTensor", kd_loss, z, v, labels)
refused("student_logits must be a DTensor", kd_loss, z, v, y, selected=shard(selected, Shard(0)))
refused("teacher_rows must be None for DTensors", kd_loss, rows, rows, labels, teacher_rows=3)
head = shard(torch.ones(7, 4), Shard(0))
x = torch.ones(3, 4)
refused("student_weight.full_tensor()", linear_kd_loss, x, head, x, torch.ones(7, 4), y[:3, 0])
dist.destroy_process_group()
# The mesh and DTensor's caches keep the group, and a thread of it that outlives the interpreter aborts the process.
os._exit(0)
"""


def test_rows_of_two_processes(tmp_path: Path) -> None:
    script = tmp_path / "sharded.py"
    script.write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
