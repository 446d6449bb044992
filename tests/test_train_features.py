"""Feature distillation: torchdistill's losses over the rows that have a teacher, beside kd_loss."""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lrds_fast
from lrds_fast import models
from lrds_fast.train import checkpoint, grid, load_recipe
from lrds_fast.train.feature_methods import METHODS
from lrds_fast.train.feature_places import usual_stages
from lrds_fast.train.features import FeatureDistillation
from lrds_fast.train.recipe import FeatureOptions, from_mapping

pytest.importorskip("torchdistill", reason="needs torchdistill: pip install torchdistill")

N, CLASSES, SAMPLES = 8, 4, 24
LABELS = torch.arange(SAMPLES) % CLASSES
#: Small enough for a test; what is not here is as published.
SMALL: dict[str, dict[str, float]] = {"crd": {"negatives": 12, "size": 16}, "cc": {"size": 16}}
INDICES = torch.tensor([3, 17, 0, 8, 21, 5, 10, 14])


def batch(rows: int = N) -> tuple[Tensor, Tensor]:
    images = torch.randn(N, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return images[:rows], LABELS[INDICES[:rows]]


def pair(student: str = "resnet8", teacher: str = "resnet20") -> tuple[Any, Any]:
    torch.manual_seed(1)
    own, given = models.create(student, num_classes=CLASSES), models.create(teacher, num_classes=CLASSES)
    given.eval().requires_grad_(False)
    return own, given


def features(method: str, student: nn.Module, teacher: nn.Module, **options: Any) -> FeatureDistillation:
    chosen = FeatureOptions(method=method, **({"options": SMALL.get(method, {})} | options))
    return FeatureDistillation(chosen, student, teacher, batch()[0], SAMPLES, LABELS)


def one_loss(loss: FeatureDistillation, student: Any, teacher: Any, rows: Any = None, shown: int = N) -> Tensor:
    images, target = batch()
    student(images)
    if shown:
        with torch.no_grad():
            teacher(images[:shown])
    out: Tensor = loss(target, INDICES, rows)
    return out


def maps(network: Any, images: Tensor) -> list[Tensor]:
    """layer1 to layer3 of a CIFAR ResNet, written out."""
    x = F.relu(network.bn1(network.conv1(images)))
    found = []
    for stage in (network.layer1, network.layer2, network.layer3):
        x = stage(x)
        found.append(x)
    return found


@pytest.mark.parametrize("method", METHODS)
def test_training_on_it_alone_lowers_it_and_leaves_the_teacher(method: str) -> None:
    student, teacher = pair()
    loss = features(method, student, teacher)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    optimizer = torch.optim.Adam([*student.parameters(), *loss.parameters()], lr=3e-3)
    seen = []
    for _ in range(12):
        value = one_loss(loss, student, teacher)
        assert value.shape == () and value.dtype == torch.float32
        optimizer.zero_grad()
        value.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in loss.parameters())
        stem = student.conv1.weight.grad
        assert stem is not None and stem.abs().max() > 0
        optimizer.step()
        seen.append(value.item())
    assert min(seen[-3:]) < seen[0] and all(map(math.isfinite, seen))
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_fitnet_at_rkd_and_sp_are_their_formulas() -> None:
    student, teacher = pair()
    student.eval()
    images, _ = batch()
    own, given = maps(student, images), maps(teacher, images)
    vectors = own[-1].mean(dim=(2, 3)), given[-1].mean(dim=(2, 3))

    fitnet = features("fitnet", student, teacher)
    regressor: Any = fitnet.criterion.regressors[0]  # type: ignore[union-attr]
    hint = F.conv2d(own[1], regressor.conv.weight, regressor.conv.bias)
    mean, variance = hint.mean(dim=(0, 2, 3), keepdim=True), hint.var(dim=(0, 2, 3), keepdim=True, correction=0)
    expected = {"fitnet": 100 * F.mse_loss(F.relu((hint - mean) / (variance + 1e-5).sqrt()), given[1])}

    def attention(x: Tensor) -> Tensor:
        power = x.pow(2).mean(dim=1).flatten(1)
        return power / power.norm(dim=1, keepdim=True)

    expected["at"] = sum(1000 * F.mse_loss(attention(s), attention(t)) for s, t in zip(own, given, strict=True))

    def distances(x: Tensor) -> Tensor:
        between = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
        return between / between.sum() * (N * (N - 1))

    def angles(x: Tensor) -> Tensor:
        towards = F.normalize(x[None] - x[:, None], dim=2)
        return torch.einsum("ijk,ilk->ijl", towards, towards)

    near, angle = (F.smooth_l1_loss(*(f(x) for x in vectors)) for f in (distances, angles))
    expected["rkd"] = 25 * near + 50 * angle

    def likeness(x: Tensor) -> Tensor:
        return F.normalize(x.flatten(1) @ x.flatten(1).T, dim=1)

    expected["sp"] = 3000 * (likeness(own[2]) - likeness(given[2])).pow(2).mean()
    for method, value in expected.items():
        loss = fitnet if method == "fitnet" else features(method, student, teacher)
        torch.testing.assert_close(one_loss(loss, student, teacher), value, rtol=1e-4, atol=1e-5, msg=method)


def test_the_others_are_torchdistills() -> None:
    """Its losses and auxiliary modules called by hand, with the parameters that ours drew."""
    from torchdistill.losses import mid_level

    student, teacher = pair()
    student.eval()
    images, _ = batch()
    own, given = maps(student, images), maps(teacher, images)
    vectors = [x[-1].mean(dim=(2, 3)) for x in (own, given)]
    at_places = {
        str(k): {"student": {"path": k, "io": "output"}, "teacher": {"path": k, "io": "output"}} for k in range(3)
    }

    def called(loss: nn.Module, mine: list[Any], theirs: list[Any]) -> Tensor:
        value: Tensor = loss(*({k: {"output": x} for k, x in enumerate(side)} for side in (mine, theirs)))
        return value

    pkt = features("pkt", student, teacher)
    expected = [(pkt, 30000 * called(mid_level.PKTLoss(0, "output", 0, "output"), vectors[:1], vectors[1:]))]

    cc: Any = features("cc", student, teacher)
    kernel = {"type": "gaussian", "gamma": 0.4, "max_p": 2}
    embedded = [head(x) for head, x in zip(cc.criterion.heads, vectors, strict=True)]
    expected += [(cc, 0.003 * called(mid_level.CCKDLoss(0, 0, kernel, "batchmean"), embedded[:1], embedded[1:]))]

    vid: Any = features("vid", student, teacher)
    predicted = [regressor(x) for regressor, x in zip(vid.criterion.regressors, own, strict=True)]
    assert predicted[0][1].flatten()[0].item() == pytest.approx(5.0, rel=1e-4)
    expected += [(vid, called(mid_level.VIDLoss(at_places), predicted, given))]

    ickd: Any = features("ickd", student, teacher)
    only = {"0": at_places["0"]}
    expected += [(ickd, 2.5 * N * called(mid_level.ChSimLoss(only), [ickd.criterion.regressors[0](own[2])], given[2:]))]

    review: Any = features("reviewkd", student, teacher)
    assert [list(fusion.conv1[0].weight.shape[:2]) for fusion in review.criterion.fusions] == [
        [64, 16], [64, 32], [64, 64], [64, 64],
    ]  # fmt: skip
    level = mid_level.HierarchicalContextLoss(0, "output", 0, "output")
    total, residual = torch.zeros(()), None
    places = zip([*own, vectors[0][:, :, None, None]], [*given, vectors[1][:, :, None, None]], strict=True)
    for fusion, (mine, theirs) in reversed(list(zip(review.criterion.fusions, places, strict=True))):
        fused, residual = fusion(mine, residual, mine.shape[-1])
        total = total + called(level, [(fused, residual)], [theirs])
    expected += [(review, total)]
    for loss, value in expected:
        torch.testing.assert_close(one_loss(loss, student, teacher), value, rtol=1e-5, atol=1e-6, msg=loss.method)


def test_crd_is_noise_contrastive_estimation_against_the_memory_bank() -> None:
    student, teacher = pair()
    student.eval()
    images, _ = batch()
    crd: Any = features("crd", student, teacher)
    vectors = [maps(network, images)[-1].mean(dim=(2, 3)) for network in (student, teacher)]
    own, given = (F.normalize(head.linear(x), dim=1) for head, x in zip(crd.criterion.heads, vectors, strict=True))
    banks = [crd.criterion.loss.memory_v1.clone(), crd.criterion.loss.memory_v2.clone()]
    torch.manual_seed(5)
    compared = torch.cat([INDICES[:, None], crd.criterion._others(INDICES)], dim=1)
    expected = torch.zeros(())
    noise = 12 / SAMPLES
    for mine, bank in ((own, banks[1]), (given, banks[0])):
        likeness = torch.exp(torch.einsum("nkd,nd->nk", bank[compared], mine) / 0.07)
        likeness = likeness / (likeness.mean() * SAMPLES)
        right = (likeness[:, 0] / (likeness[:, 0] + noise + 1e-7)).log().sum()
        wrong = (noise / (likeness[:, 1:] + noise + 1e-7)).log().sum()
        expected = expected - (right + wrong) / N
    torch.manual_seed(5)
    torch.testing.assert_close(one_loss(crd, student, teacher), 0.8 * expected, rtol=1e-4, atol=1e-4)
    for bank, now, mine in zip(
        banks, (crd.criterion.loss.memory_v1, crd.criterion.loss.memory_v2), (own, given), strict=True
    ):
        moved = bank.clone()
        moved[INDICES] = F.normalize(0.5 * bank[INDICES] + 0.5 * mine.detach(), dim=1)
        torch.testing.assert_close(now, moved, rtol=1e-5, atol=1e-6)


def test_crds_negatives_are_all_samples_of_other_classes_alike() -> None:
    student, teacher = pair()
    labels = torch.tensor([0, 0, 1, 0, 2, 1, 2, 2, 1, 0] + [1] * 14)
    options = FeatureOptions(method="crd", options={"negatives": 20000, "size": 4})
    crd: Any = FeatureDistillation(options, student, teacher, batch()[0], SAMPLES, labels)
    rows = torch.tensor([0, 4, 23])
    drawn = crd.criterion._others(rows)
    for row, others in zip(rows, drawn, strict=True):
        counts = torch.bincount(others, minlength=SAMPLES)
        allowed = labels != labels[row]
        assert counts[~allowed].sum() == 0
        expected = 20000 / int(allowed.sum())
        assert (counts[allowed] - expected).abs().max() < 6 * expected**0.5, "6 standard deviations of Poisson counts"
    alone: Any = FeatureDistillation(options, student, teacher, batch()[0], SAMPLES)
    counts = torch.bincount(alone.criterion._others(torch.tensor([7]))[0], minlength=SAMPLES)
    assert counts[7] == 0 and (counts > 0).sum() == SAMPLES - 1
    with pytest.raises(ValueError, match="'crd' needs training samples of two classes"):
        FeatureDistillation(options, student, teacher, batch()[0], SAMPLES, torch.zeros(SAMPLES, dtype=torch.long))


@pytest.mark.parametrize("method", METHODS)
def test_the_rows_with_a_teacher_count_and_the_mean_is_over_the_batch(method: str) -> None:
    """A prefix, a longer prefix of which some count, and a mask are the same number: K / N times these rows' loss."""
    student, teacher = pair()
    student.eval()  # a row's features do not depend on the other rows
    loss = features(method, student, teacher)
    loss.eval()
    start = copy.deepcopy(loss.state_dict())
    images, target = batch()
    mask = torch.arange(N) < 5

    def value(rows: Any, shown: int) -> Tensor:
        loss.load_state_dict(start)  # the memory bank moves
        torch.manual_seed(3)
        return one_loss(loss, student, teacher, rows, shown)

    prefix = value(None, 5)
    assert prefix.item() > 0
    for rows, shown in ((5, 5), (5, 6), (mask, N)):
        torch.testing.assert_close(value(rows, shown), prefix, rtol=1e-4, atol=1e-6)
    loss.load_state_dict(start)
    torch.manual_seed(3)
    student(images[:5])
    with torch.no_grad():
        teacher(images[:5])
    torch.testing.assert_close(prefix, loss(target[:5], INDICES[:5]) * 5 / N, rtol=1e-4, atol=1e-6)
    # Rows in any order: those that are denied the teacher lie between the others.
    order = torch.tensor([5, 0, 1, 6, 2, 3, 7, 4])
    loss.load_state_dict(start)
    torch.manual_seed(3)
    student(images[order])
    with torch.no_grad():
        teacher(images[order])
    torch.testing.assert_close(loss(target[order], INDICES[order], mask[order]), prefix, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["fitnet", "at", "vid", "ickd"])
def test_a_loss_of_single_rows_is_their_mean(method: str) -> None:
    student, teacher = pair()
    student.eval()
    loss = features(method, student, teacher).eval()
    whole = one_loss(loss, student, teacher)
    first = torch.arange(N) < 3
    parts = [one_loss(loss, student, teacher, rows) for rows in (first, ~first)]
    torch.testing.assert_close(parts[0] + parts[1], whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_no_teacher_is_zero_with_zero_gradients(method: str) -> None:
    student, teacher = pair()
    loss = features(method, student, teacher)
    nobody = torch.zeros(N, dtype=torch.bool)
    cases: list[tuple[Any, int]] = [(0, 0), (0, 1), (nobody, N)]
    cases += [(1, 1)] if METHODS[method].least == 2 else []
    for rows, shown in cases:
        with torch.no_grad():
            student.bn1.weight.fill_(float("inf"))  # features that are not finite do not leak
        value = one_loss(loss, student, teacher, rows, shown)
        assert value.item() == 0 and value.dtype == torch.float32
        value.backward()
        for parameter in (student.conv1.weight, *loss.parameters()):
            assert parameter.grad is not None
        assert all(not parameter.grad.any() for parameter in loss.parameters() if parameter.grad is not None)
        with torch.no_grad():
            student.bn1.weight.fill_(1.0)
        (2 * one_loss(loss, student, teacher)).backward()
        student.zero_grad()
        loss.zero_grad()


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_gives_the_same_next_loss(method: str, tmp_path: Path) -> None:
    student, teacher = pair()
    loss = features(method, student, teacher)
    optimizer = torch.optim.SGD([*student.parameters(), *loss.parameters()], lr=1e-4, momentum=0.9)

    def step(own: Any, measure: FeatureDistillation, rule: torch.optim.Optimizer) -> float:
        value = one_loss(measure, own, teacher)
        rule.zero_grad()
        value.backward()
        rule.step()
        return value.item()

    step(student, loss, optimizer)
    path = tmp_path / "last.pt"
    checkpoint.save(path, epoch=1, facts={}, student=student, parts={"optimizer": optimizer, "features": loss})
    expected = [step(student, loss, optimizer) for _ in range(2)]
    assert not any("criterion" in key for key in torch.load(path, weights_only=True)["student"])

    student, _ = pair()
    loss = features(method, student, teacher)
    optimizer = torch.optim.SGD([*student.parameters(), *loss.parameters()], lr=1e-4, momentum=0.9)
    checkpoint.resume(path, facts={}, student=student, parts={"optimizer": optimizer, "features": loss})
    assert [step(student, loss, optimizer) for _ in range(2)] == expected


def test_a_plain_loop_with_revision_selection_and_features() -> None:
    """All that a loop does: the loss beside kd_loss's, its parameters beside the student's."""
    student, teacher = pair()
    pictures = torch.randn(SAMPLES, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    selected = torch.arange(SAMPLES) % 3 != 0
    loss = FeatureDistillation(
        FeatureOptions(method="crd", options=SMALL["crd"]), student, teacher, pictures[:2], SAMPLES, LABELS
    )
    optimizer = torch.optim.SGD(nn.ModuleList([student, loss]).parameters(), lr=0.02, momentum=0.9)
    means = []
    for epoch in range(8):
        total = 0.0
        for indices in torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(epoch)).split(N):
            indices = torch.cat([indices[selected[indices]], indices[~selected[indices]]])
            count, target = int(selected[indices].sum()), LABELS[indices]
            logits = student(pictures[indices])
            with torch.no_grad():
                taught = teacher(pictures[indices[:count]])
            value = lrds_fast.kd_loss(logits, taught, target, revise="lr") + loss(target, indices, count)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            total += value.item()
        means.append(total)
    assert means[-1] < means[0]
    moved = (loss.criterion.loss.memory_v1.norm(dim=1) - 1).abs() < 1e-5  # type: ignore[union-attr]
    assert torch.equal(moved, selected), "those who are denied the teacher never enter the memory bank"
    alone = student.eval()(pictures)
    loss.close()
    torch.testing.assert_close(student(pictures), alone)
    assert not any(module._forward_hooks for network in (student, teacher) for module in network.modules())


def test_passes_that_are_missing_or_cannot_be_used_are_named() -> None:
    student, teacher = pair()
    loss = features("at", student, teacher)
    images, target = batch()
    with pytest.raises(RuntimeError, match="the student did not run with gradients since the last loss"):
        loss(target, INDICES)
    with torch.no_grad():
        student(images)  # an evaluation
    with pytest.raises(RuntimeError, match="the student did not run with gradients"):
        loss(target, INDICES)
    student(images)
    with pytest.raises(RuntimeError, match="the teacher did not run since the last loss; call it, or pass rows=0"):
        loss(target, INDICES)
    student(images)
    with torch.inference_mode():
        teacher(images)
    with pytest.raises(RuntimeError, match=r"torch.inference_mode.*run it under torch.no_grad"):
        loss(target, INDICES)
    for rows, shown, message in (
        (6, 5, r"rows must be 0 to 5: the teacher ran on 5 of 8; got 6"),
        (-1, 5, r"rows must be 0 to 5"),
        (torch.ones(N), N, r"rows must be bool of shape \(8,\).*got torch.float32"),
        (torch.ones(N - 1, dtype=torch.bool), N, r"rows must be bool of shape \(8,\).*\(7,\)"),
        (torch.ones(N, dtype=torch.bool), 5, r"a teacher that ran on 5 rows"),
    ):
        with pytest.raises(ValueError, match=message):
            one_loss(loss, student, teacher, rows, shown)
    student(images)
    with pytest.raises(ValueError, match="must have the student's 8 rows; got 7 and 8"):
        loss(target[:7], INDICES)


def test_evaluations_and_copies_in_between_are_not_heard() -> None:
    student, teacher = pair()
    student.eval()
    loss = features("at", student, teacher)
    images, target = batch()
    expected = one_loss(loss, student, teacher)
    average = copy.deepcopy(student)
    student(images)
    with torch.inference_mode():
        student(-images)
        average(-images)
    average(-images)
    with torch.no_grad():
        teacher(images)
    assert torch.equal(loss(target, INDICES), expected)


def test_building_leaves_the_networks_as_they_were() -> None:
    student, teacher = pair()
    student.layer1.eval()  # a student of which a part is frozen
    modes = [module.training for module in student.modules()]
    before = copy.deepcopy(student.state_dict())
    loss = features("reviewkd", student, teacher)
    assert [module.training for module in student.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert list(student.state_dict()) == list(before)
    assert not any(key.startswith(("student", "teacher", "_")) for key in loss.state_dict())


def test_bfloat16_passes_give_a_float32_loss_close_to_that_of_float32() -> None:
    student, teacher = pair()
    student.eval()
    for method in ("at", "fitnet", "reviewkd"):
        loss = features(method, student, teacher)
        expected = one_loss(loss, student, teacher)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = one_loss(loss, student, teacher)
        assert value.dtype == torch.float32
        value.backward()
        torch.testing.assert_close(value, expected, rtol=0.1, atol=1e-2)


def test_distributed_students_are_seen_through() -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        student, teacher = pair()
        wrapped = nn.parallel.DistributedDataParallel(student.eval())
        expected = one_loss(features("at", student, teacher), student, teacher)
        value = one_loss(features("at", wrapped, teacher), wrapped, teacher)
        torch.testing.assert_close(value, expected)
        value.backward()
        assert student.conv1.weight.grad.abs().max() > 0
    finally:
        dist.destroy_process_group()


def test_compiled_networks_are_refused() -> None:
    student, teacher = pair()
    for network in (torch.compile(student), student):
        student.compile()
        with pytest.raises(ValueError, match="does not go with torch.compile"):
            features("at", network, teacher)


@pytest.mark.parametrize(
    ("student", "teacher", "places"),
    [
        ("wrn_16_1", "wrn_16_2", (["block1", "block2", "block3"], ["block1", "block2", "block3"])),
        ("vgg8", "vgg11", ([f"block{i}:relu" for i in (1, 2, 3, 4)],) * 2),
        ("ShuffleV1", "resnet8x4", (["layer1", "layer2", "layer3"],) * 2),
        ("ShuffleV2", "ResNet18", (["layer1", "layer2", "layer3"], ["layer2", "layer3", "layer4"])),
        ("MobileNetV2", "vgg8", ([f"blocks.{i}" for i in (1, 2, 4, 6)], [f"block{i}:relu" for i in (1, 2, 3, 4)])),
        ("MobileNetV2", "wrn_16_2", (["blocks.2", "blocks.4", "blocks.6"], ["block1", "block2", "block3"])),
        ("torchvision:resnet18", "torchvision:resnet18", ([f"layer{i}" for i in (1, 2, 3, 4)],) * 2),
        (
            "timm:mobilenetv1_100",
            "timm:resnet18",
            ([f"blocks.{i}" for i in (1, 2, 3, 4)], [f"layer{i}" for i in (1, 2, 3, 4)]),
        ),
    ],
)  # fmt: skip
def test_the_families_usual_places_pair(student: str, teacher: str, places: tuple[list[str], list[str]]) -> None:
    if ":" in student:
        pytest.importorskip(student.partition(":")[0])
    own, given = pair(student, teacher)
    images = torch.randn(2, 3, 32, 32)
    target, indices = torch.tensor([0, 1]), torch.tensor([3, 4])
    for method in ("at", "reviewkd", "fitnet"):
        loss = FeatureDistillation(FeatureOptions(method=method), own, given, images, SAMPLES)
        if method == "at":
            assert (loss.student_layers, loss.teacher_layers) == places
        own(images)
        with torch.no_grad():
            given(images)
        value = loss(target, indices)
        value.backward()
        assert value.isfinite() and value > 0
        loss.close()


def test_places_can_be_named() -> None:
    student, teacher = pair()
    student.eval()
    images, target = batch()
    named = features("at", student, teacher, student_layers=("layer1", "layer3"), teacher_layers=("layer1", "layer3.2"))
    assert "layer3 <- layer3.2" in repr(named)
    own, given = maps(student, images), maps(teacher, images)
    same = features("at", student, teacher, student_layers=("layer2",))
    assert (same.student_layers, same.teacher_layers) == (["layer2"], ["layer3"]), "the deepest of the other's"
    value = one_loss(named, student, teacher)
    attention = [[F.normalize(x.pow(2).mean(dim=1).flatten(1)) for x in (side[0], side[2])] for side in (own, given)]
    torch.testing.assert_close(value, 1000 * sum(F.mse_loss(s, t) for s, t in zip(*attention, strict=True)))
    pooled = features("rkd", student, teacher, student_layers=("layer3",), teacher_layers=("fc:input",))
    usual = features("rkd", student, teacher)
    torch.testing.assert_close(one_loss(pooled, student, teacher), one_loss(usual, student, teacher))
    doubled = features("rkd", student, teacher, weight=2.0)
    torch.testing.assert_close(one_loss(doubled, student, teacher), 2 * one_loss(usual, student, teacher))
    zero = features("rkd", student, teacher, weight=0.0)
    assert one_loss(zero, student, teacher).item() == 0


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("at", {"student_layers": ("layr3",)}, r"the student has no module 'layr3'; did you mean 'layer3'"),
        ("at", {"teacher_layers": ("layer1", "x")}, r"the teacher has no module 'x'; it has conv1, bn1"),
        ("at", {"student_layers": ("layer1:output:relu",)}, r"must end in :input, :relu or neither"),
        ("at", {"student_layers": ("fc",)}, r"'at' takes maps \(N, C, H, W\); fc gives \(2, 4\)"),
        ("at", {"student_layers": ("layer1",) * 4}, r"teacher_layers: name 4 places, as many as of the other network"),
        ("rkd", {"student_layers": ("layer1.0.downsample",)}, "has no module"),
    ],
)  # fmt: skip
def test_wrong_places_are_named_in_one_line(method: str, options: dict[str, Any], message: str) -> None:
    student, teacher = pair()
    with pytest.raises(ValueError, match=message) as raised:
        features(method, student, teacher, **options)
    assert "\n" not in str(raised.value)
    assert not any(module._forward_hooks for network in (student, teacher) for module in network.modules())


def test_unknown_networks_say_what_can_be_named() -> None:
    _, teacher = pair()
    student = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 14 * 14, CLASSES))
    with pytest.raises(ValueError, match=r"usual places of Sequential for 'at' are not known; name them, out of 0, 1"):
        features("at", student, teacher)
    value = one_loss(features("at", student, teacher, student_layers=("1",)), student, teacher)
    assert value.item() > 0
    assert usual_stages(student) == []
    assert one_loss(features("pkt", student, teacher), student, teacher).item() > 0


def test_without_torchdistill_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = pair()
    monkeypatch.setitem(sys.modules, "torchdistill.losses", None)
    with pytest.raises(ImportError, match=r"needs torchdistill: pip install 'lrds-fast\[features\]'") as raised:
        features("at", student, teacher)
    assert "\n" not in str(raised.value)
    assert not any(module._forward_hooks for network in (student, teacher) for module in network.modules())


def recipes() -> Iterator[tuple[list[str], str]]:
    yield ["features.method=fitnets"], r"features.method must be one of fitnet, at.*did you mean 'fitnet'\?"
    yield ["features.method=zzz"], r"got 'zzz'; or \"\" for none"
    yield ["features.options.size=3"], r"features.options needs features.method"
    yield ['features.student_layers=["a"]'], r"features.student_layers needs features.method"
    yield ["features.method=at", "features.options.size=3"], r"options.size: 'at' has no such option; it has none"
    yield ["features.method=rkd", "features.options.size=3"], r"'rkd' has no such option; it has distance, angle"
    yield ["features.method=crd", "features.options.size=3.5"], r"options.size must be a whole number of at least 1"
    yield ["features.method=crd", "features.options.momentum=1"], r"options.momentum must be in \[0, 1\); got 1.0"
    yield ["features.method=crd", "features.options.temperature=0"], r"options.temperature must be above 0; got 0.0"
    yield ["features.method=rkd", "features.options.angle=-1"], r"options.angle must be at least 0"
    yield ["features.method=rkd", "features.options.angle=inf"], r"options.angle must be at least 0"
    yield ["features.method=rkd", "features.options.angle=x"], r"features.options.angle must be float"
    yield ["features.method=at", "features.weight=nan"], r"features.weight must be finite"
    yield ["features.method=sp", 'features.student_layers=["a", "b"]'], r"'sp' looks at one place; got a, b"
    yield ["features.method=reviewkd", 'features.teacher_layers=["a"]'], r"'reviewkd' takes two places or more"
    yield (
        ["features.method=at", 'features.student_layers=["a"]', 'features.teacher_layers=["a", "b"]'],
        r"must be as many; got 1 and 2",
    )
    yield ["features.metod=at"], r"unknown key 'features.metod'; did you mean 'features.method'"


@pytest.mark.parametrize(("settings", "message"), list(recipes()))
def test_mistakes_in_recipes_are_named(settings: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe("digits_kd", settings)


def test_recipes_take_features_and_leave_them_out_by_default() -> None:
    assert load_recipe("digits_kd").features == FeatureOptions()
    settings = ["features.method=crd", "features.options.negatives=64", "features.weight=0.5"]
    recipe = load_recipe("cifar100_resnet56_resnet20", settings)
    assert (recipe.features.options, recipe.features.weight) == ({"negatives": 64.0}, 0.5)
    assert from_mapping(json.loads(recipe.to_json())) == recipe
    assert grid.PAIRS  # the grid composes such recipes: tests/test_train_grid.py
