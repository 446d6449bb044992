"""Feature distillation: torchdistill's losses over the rows that have a teacher, beside kd_loss."""

from __future__ import annotations

import copy
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from feature_cases import INDICES, LABELS, SAMPLES, SMALL, N, batch, features, maps, one_loss, pair
from torch import Tensor, nn

import lrds_fast
from lrds_fast.features.distillation import FeatureDistillation
from lrds_fast.recipe.feature_methods import METHODS
from lrds_fast.recipe.recipe import FeatureOptions
from lrds_fast.train import checkpoint

pytest.importorskip("torchdistill", reason="needs torchdistill: pip install torchdistill")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("method", METHODS)
def test_training_lowers_the_loss_and_keeps_the_teacher(method: str) -> None:
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


def test_fitnet_at_rkd_and_sp_match_their_formulas() -> None:
    student, teacher = pair()
    student.eval()
    images, _ = batch()
    own, given = maps(student, images), maps(teacher, images)
    vectors = own[-1].mean(dim=(2, 3)), given[-1].mean(dim=(2, 3))

    fitnet = features("fitnet", student, teacher)
    criterion: Any = fitnet.criterion
    regressor = criterion.regressors[0]
    hint = F.conv2d(own[1], regressor.conv.weight, regressor.conv.bias)
    mean, variance = hint.mean(dim=(0, 2, 3), keepdim=True), hint.var(dim=(0, 2, 3), keepdim=True, correction=0)
    expected = {"fitnet": 100 * F.mse_loss(F.relu((hint - mean) / (variance + 1e-5).sqrt()), given[1])}

    def attention(x: Tensor) -> Tensor:
        power = x.pow(2).mean(dim=1).flatten(1)
        unit: Tensor = power / power.norm(dim=1, keepdim=True)
        return unit

    losses = [F.mse_loss(attention(s), attention(t)) for s, t in zip(own, given, strict=True)]
    expected["at"] = 1000 * torch.stack(losses).sum()

    def distances(x: Tensor) -> Tensor:
        between = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
        return between / between.sum() * (N * (N - 1))

    def angles(x: Tensor) -> Tensor:
        towards = F.normalize(x[None] - x[:, None], dim=2)
        return torch.einsum("ijk,ilk->ijl", towards, towards)

    near, angle = (F.smooth_l1_loss(f(vectors[0]), f(vectors[1])) for f in (distances, angles))
    expected["rkd"] = 25 * near + 50 * angle

    def likeness(x: Tensor) -> Tensor:
        return F.normalize(x.flatten(1) @ x.flatten(1).T, dim=1)

    expected["sp"] = 3000 * (likeness(own[2]) - likeness(given[2])).pow(2).mean()
    for method, value in expected.items():
        loss = fitnet if method == "fitnet" else features(method, student, teacher)
        torch.testing.assert_close(one_loss(loss, student, teacher), value, rtol=1e-4, atol=1e-5, msg=method)


def test_other_losses_match_torchdistill() -> None:
    """torchdistill's losses and auxiliary modules called directly, with the initial parameters of ours."""
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

    def value(rows: Any, teacher_rows: int) -> Tensor:
        loss.load_state_dict(start)  # the memory bank moves
        torch.manual_seed(3)
        return one_loss(loss, student, teacher, rows, teacher_rows)

    prefix = value(None, 5)
    assert prefix.item() > 0
    for rows, teacher_rows in ((5, 5), (5, 6), (mask, N)):
        torch.testing.assert_close(value(rows, teacher_rows), prefix, rtol=1e-4, atol=1e-6)
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
def test_the_batch_loss_is_the_mean_over_single_rows(method: str) -> None:
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
    empty = torch.zeros(N, dtype=torch.bool)
    cases: list[tuple[Any, int]] = [(0, 0), (0, 1), (empty, N)]
    cases += [(1, 1)] if METHODS[method].least == 2 else []
    for rows, teacher_rows in cases:
        with torch.no_grad():
            student.bn1.weight.fill_(float("inf"))  # features that are not finite do not leak
        value = one_loss(loss, student, teacher, rows, teacher_rows)
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
    parts: dict[str, Any] = {"optimizer": optimizer, "features": loss}
    checkpoint.save(path, checkpoint.Position(1, 0, {}), facts={}, student=student, parts=parts)
    expected = [step(student, loss, optimizer) for _ in range(2)]
    assert not any("criterion" in key for key in torch.load(path, weights_only=True)["student"])

    student, _ = pair()
    loss = features(method, student, teacher)
    optimizer = torch.optim.SGD([*student.parameters(), *loss.parameters()], lr=1e-4, momentum=0.9)
    checkpoint.resume(path, facts={}, student=student, parts={"optimizer": optimizer, "features": loss})
    assert [step(student, loss, optimizer) for _ in range(2)] == expected


def test_a_plain_loop_with_revision_selection_and_features() -> None:
    """A plain loop adds the loss to kd_loss and the adapters to the optimizer."""
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
            value = lrds_fast.kd_loss(logits, taught, target, teacher_rows=count) + loss(target, indices, count)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            total += value.item()
        means.append(total)
    assert means[-1] < means[0]
    criterion: Any = loss.criterion
    moved = (criterion.loss.memory_v1.norm(dim=1) - 1).abs() < 1e-5
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
    for rows, teacher_rows, message in (
        (6, 5, r"rows must be 0 to 5: the teacher ran on 5 of 8; got 6"),
        (-1, 5, r"rows must be 0 to 5"),
        (torch.ones(N), N, r"rows must be bool of shape \(8,\).*got torch.float32"),
        (torch.ones(N - 1, dtype=torch.bool), N, r"rows must be bool of shape \(8,\).*\(7,\)"),
        (torch.ones(N, dtype=torch.bool), 5, r"a teacher that ran on 5 rows"),
    ):
        with pytest.raises(ValueError, match=message):
            one_loss(loss, student, teacher, rows, teacher_rows)
    student(images)
    with pytest.raises(ValueError, match="must have the student's 8 rows; got 7 and 8"):
        loss(target[:7], INDICES)


def test_evaluations_and_copies_do_not_disturb_the_hooks() -> None:
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


def test_distributed_students_are_unwrapped() -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
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
    networks: list[Any] = [torch.compile(student), student]
    for network in networks:
        student.compile()
        with pytest.raises(ValueError, match="cannot be combined with torch.compile"):
            features("at", network, teacher)


def test_without_torchdistill_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = pair()
    monkeypatch.setitem(sys.modules, "torchdistill.losses", None)
    with pytest.raises(ImportError, match=r"needs torchdistill: pip install torchdistill") as raised:
        features("at", student, teacher)
    assert "\n" not in str(raised.value)
    assert not any(module._forward_hooks for network in (student, teacher) for module in network.modules())


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_cuda_agrees_with_the_cpu(method: str) -> None:
    student, teacher = pair()
    student.eval()
    torch.backends.cudnn.allow_tf32 = False
    loss = features(method, student, teacher).eval()
    there = FeatureDistillation(
        FeatureOptions(method=method, options=SMALL.get(method, {})),
        student.cuda(),
        teacher.cuda(),
        batch()[0].cuda(),
        SAMPLES,
        LABELS,
    ).eval()
    there.load_state_dict(loss.state_dict())
    if method == "crd":  # the generators differ: the same negatives for both
        on_cpu: Any = loss.criterion
        on_gpu: Any = there.criterion
        chosen = on_cpu._others(torch.arange(SAMPLES))
        on_cpu._others = lambda where: chosen[where]
        on_gpu._others = lambda where: chosen.cuda()[where]
    images, target = batch()
    mask = torch.arange(N) != 2
    student(images.cuda())
    with torch.no_grad():
        teacher(images.cuda())
    value = there(target.cuda(), INDICES, mask)
    value.backward()
    assert student.conv1.weight.grad.isfinite().all() and value.is_cuda
    student.cpu()
    teacher.cpu()
    torch.testing.assert_close(value.cpu(), one_loss(loss, student, teacher, mask), rtol=1e-3, atol=1e-4)
