"""Errors of kd_loss: one line names the argument, the expected value and the actual one."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import kd_cases
import numpy as np
import pytest
import torch

from lrds_fast import (
    DKD,
    KDLoss,
    TopKTeacher,
    dist_loss,
    functional,
    kd_loss,
    kd_loss_parts,
    mlkd_loss,
    reference,
    revise_labels,
    revision_loss,
)

Change = Callable[[dict[str, Any]], None]


def arguments() -> dict[str, Any]:
    rows = kd_cases.rows(6, 10)
    return {
        "student_logits": rows.student,
        "teacher_logits": rows.teacher,
        "target": rows.target,
    }


def replaced(**changes: Any) -> Change:
    return lambda given: given.update(changes)


def target_with(row: int, value: int) -> torch.Tensor:
    target: torch.Tensor = arguments()["target"].clone()
    target[row] = value
    return target


def weights_with(row: int, value: float) -> torch.Tensor:
    weights = torch.ones(6)
    weights[row] = value
    return weights


class Output:
    """A model output like those of transformers."""

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits


Z = torch.zeros
CACHED = TopKTeacher.from_logits(Z(6, 10), 3, temperature=4.0)
# (id, change, exception, what the message must say: the argument, the expectation, what arrived)
REFUSED: list[tuple[str, Change, type[Exception] | tuple[type[Exception], ...], list[str]]] = [
    ("student no tensor", replaced(student_logits=[[1.0]]), TypeError, ["student_logits", "list"]),
    ("teacher no tensor", replaced(teacher_logits=None), TypeError, ["teacher_logits", "None"]),
    ("target no tensor", replaced(target=[1, 2]), TypeError, ["target", "list"]),
    (
        "student int",
        replaced(student_logits=Z(6, 10).long()),
        TypeError,
        ["student_logits", "[Ll]ong|int64"],
    ),
    (
        "teacher int",
        replaced(teacher_logits=Z(6, 10).int()),
        TypeError,
        ["teacher_logits", "[Ii]nt"],
    ),
    (
        "complex",
        replaced(student_logits=Z(6, 10).to(torch.complex64)),
        TypeError,
        ["student_logits", "[Cc]omplex"],
    ),
    ("student 0-d", replaced(student_logits=Z(())), ValueError, ["student_logits"]),
    (
        "no classes",
        replaced(student_logits=Z(6, 0), teacher_logits=Z(6, 0)),
        ValueError,
        ["student_logits", r"\b0\b"],
    ),
    ("class count", replaced(teacher_logits=Z(6, 11)), ValueError, ["teacher_logits", "10", "11"]),
    (
        "teacher has more rows",
        replaced(teacher_logits=Z(7, 10)),
        ValueError,
        ["teacher_logits", "6", "7"],
    ),
    ("target float", replaced(target=Z(6)), TypeError, ["target", "int64", "[Ff]loat"]),
    ("target bool", replaced(target=Z(6).bool()), TypeError, ["target", "[Bb]ool"]),
    ("target int16", replaced(target=Z(6).short()), TypeError, ["target", "[Ss]hort|int16"]),
    ("target short", replaced(target=Z(5).long()), ValueError, ["target", "6", "5"]),
    ("target 2-d", replaced(target=Z(6, 1).long()), ValueError, ["target", "6"]),
    ("target transposed", replaced(target=Z(2, 3).long()), ValueError, ["target"]),
    (
        "target above",
        replaced(target=target_with(4, 10)),
        ValueError,
        ["target", r"\b4\b", r"\b10\b"],
    ),
    ("target below", replaced(target=target_with(2, -1)), ValueError, ["target", r"\b2\b", "-1"]),
    (
        "target int32",
        replaced(target=target_with(3, 77).int()),
        ValueError,
        ["target", r"\b3\b", "77"],
    ),
    ("target huge", replaced(target=target_with(3, 2**40)), ValueError, ["target", str(2**40)]),
    (
        "another ignore_index",
        replaced(target=target_with(1, -100), ignore_index=-1),
        ValueError,
        ["target", "-100"],
    ),
    (
        "teacher elsewhere",
        replaced(teacher_logits=Z(6, 10, device="meta")),
        ValueError,
        ["cpu", "meta"],
    ),
    ("target elsewhere", replaced(target=Z(6, device="meta").long()), ValueError, ["cpu", "meta"]),
    (
        "selected elsewhere",
        replaced(selected=Z(6, device="meta").bool()),
        ValueError,
        ["selected", "cpu", "meta"],
    ),
    ("eta 0", replaced(eta=0.0), ValueError, ["eta", r"0.*1", r"0\.0"]),
    ("eta 1", replaced(eta=1.0), ValueError, ["eta", r"1\.0"]),
    ("eta negative", replaced(eta=-0.5), ValueError, ["eta", "-0.5"]),
    ("eta NaN", replaced(eta=math.nan), ValueError, ["eta", "nan"]),
    ("temperature 0", replaced(temperature=0.0), ValueError, ["temperature", r"0"]),
    ("temperature negative", replaced(temperature=-4.0), ValueError, ["temperature", r"-4"]),
    ("temperature inf", replaced(temperature=math.inf), ValueError, ["temperature", "inf"]),
    ("temperature NaN", replaced(temperature=math.nan), ValueError, ["temperature", "nan"]),
    ("temperature text", replaced(temperature="4"), TypeError, ["temperature", "str|'4'"]),
    ("ce_weight NaN", replaced(ce_weight=math.nan), ValueError, ["ce_weight", "nan"]),
    ("kd_weight inf", replaced(kd_weight=math.inf), ValueError, ["kd_weight", "inf"]),
    (
        "unselected inf",
        replaced(ce_weight_unselected=-math.inf),
        ValueError,
        ["ce_weight_unselected", "-inf"],
    ),
    ("revise", replaced(revise="lri"), ValueError, ["revise", "'lr'", "None", "'lri'"]),
    ("revise bool", replaced(revise=True), (ValueError, TypeError), ["revise", "True|bool"]),
    ("divergence", replaced(divergence="js"), ValueError, ["divergence", "'kl'", "'js'"]),
    (
        "reduction",
        replaced(reduction="batchmean"),
        ValueError,
        ["reduction", "'mean'", "'batchmean'"],
    ),
    ("smoothing above", replaced(label_smoothing=1.1), ValueError, ["label_smoothing", "1.1"]),
    ("smoothing below", replaced(label_smoothing=-0.1), ValueError, ["label_smoothing", "-0.1"]),
    ("smoothing NaN", replaced(label_smoothing=math.nan), ValueError, ["label_smoothing", "nan"]),
    (
        "selected int",
        replaced(selected=torch.ones(6).long()),
        TypeError,
        ["selected", "[Ll]ong|int64"],
    ),
    ("selected list", replaced(selected=[True] * 6), TypeError, ["selected", "list"]),
    ("selected short", replaced(selected=torch.ones(5).bool()), ValueError, ["selected", "6", "5"]),
    ("selected 2-d", replaced(selected=torch.ones(2, 3).bool()), ValueError, ["selected"]),
    (
        "selected above 1",
        replaced(selected=weights_with(3, 1.5)),
        ValueError,
        ["selected", r"\b3\b", "1.5"],
    ),
    (
        "selected below 0",
        replaced(selected=weights_with(5, -0.25)),
        ValueError,
        ["selected", r"\b5\b", "-0.25"],
    ),
    (
        "selected NaN",
        replaced(selected=weights_with(0, math.nan)),
        ValueError,
        ["selected", r"\b0\b", "nan"],
    ),
    (
        "prefix and selected",
        replaced(teacher_logits=Z(4, 10), teacher_rows=4, selected=torch.ones(6).bool()),
        ValueError,
        ["selected", "None", "teacher_rows"],
    ),
    (
        "teacher has fewer rows",
        replaced(teacher_logits=Z(5, 10)),
        ValueError,
        [r"\(6, 10\).*\(5, 10\)", "shifted", "same batch", "teacher_rows=5$"],
    ),
    ("teacher has no rows", replaced(teacher_logits=Z(0, 10)), ValueError, ["teacher_rows=0$"]),
    (
        "teacher has other rows",
        replaced(student_logits=Z(2, 3, 10), teacher_logits=Z(3, 2, 10), target=Z(2, 3).long()),
        ValueError,
        [r"\(2, 3, 10\).*\(3, 2, 10\).*same batch\.$"],
    ),
    (
        "a shifted teacher",
        replaced(student_logits=Z(2, 3, 10), teacher_logits=Z(2, 2, 10), target=Z(2, 3).long()),
        ValueError,
        [r"\(2, 3, 10\).*\(2, 2, 10\).*same batch\.$"],
    ),
    ("teacher_rows below", replaced(teacher_logits=Z(5, 10), teacher_rows=4), ValueError, ["teacher_rows", "5", "4"]),
    ("teacher_rows above", replaced(teacher_rows=7), ValueError, ["teacher_rows", "6", "7"]),
    ("teacher_rows above the student's", replaced(teacher_logits=Z(7, 10), teacher_rows=7), ValueError, ["<= 6", "7"]),
    ("teacher_rows bool", replaced(teacher_logits=Z(1, 10), teacher_rows=True), TypeError, ["teacher_rows", "True"]),
    ("teacher_rows float", replaced(teacher_rows=6.0), TypeError, ["teacher_rows", "6.0"]),
    ("student tuple", replaced(student_logits=(Z(6, 10), Z(6, 4))), TypeError, ["student_logits", "tuple", r"\[0\]"]),
    ("teacher tuple", replaced(teacher_logits=(Z(6, 10),)), TypeError, ["teacher_logits", "tuple", r"\[0\]"]),
    ("student output", replaced(student_logits=Output(Z(6, 10))), TypeError, ["student_logits", "Output", r"\.logits"]),
    ("teacher output", replaced(teacher_logits=Output(Z(6, 10))), TypeError, ["teacher_logits", "Output", r"\.logits"]),
    ("student dict", replaced(student_logits={"out": Z(6, 10)}), TypeError, ["student_logits", "dict", "'out'"]),
    ("student cached", replaced(student_logits=CACHED), TypeError, ["student_logits", "TopKTeacher", r"\.dense"]),
    (
        "classes in dimension 1",
        replaced(student_logits=Z(6, 10, 4, 5), teacher_logits=Z(6, 10, 4, 5), target=Z(6, 4, 5).long()),
        ValueError,
        ["target", r"\(6, 10, 4\)", r"student_logits\.movedim\(1, -1\)"],
    ),
    (
        "target's classes in dimension 1",
        replaced(student_logits=Z(6, 4, 10), teacher_logits=Z(6, 4, 10), target=Z(6, 10, 4)),
        ValueError,
        ["target", r"\(6, 4, 10\)", r"soft targets.*movedim\(1, -1\)"],
    ),
    (
        "classes in either dimension",
        replaced(student_logits=Z(6, 4, 4, 4), teacher_logits=Z(6, 4, 4, 4), target=Z(6, 4, 4).long()),
        ValueError,
        ["student_logits", r"\(6, 4, 4, 4\)", r"movedim\(1, -1\)", r"flatten\(0, -2\)"],
    ),
    (
        "soft target's classes in either dimension",
        replaced(student_logits=Z(6, 4, 2, 5), teacher_logits=Z(6, 4, 2, 5), target=torch.full((6, 4, 2, 5), 0.25)),
        ValueError,
        ["student_logits", r"\(6, 4, 2, 5\)", r"movedim\(1, -1\)"],
    ),
    ("T", replaced(T=4.0), TypeError, ["'T'", "temperature"]),
    ("tau", replaced(tau=4.0), TypeError, ["'tau'", "temperature"]),
    ("alpha", replaced(alpha=0.5), TypeError, ["'alpha'", "ce_weight", "kd_weight"]),
    ("lambda", replaced(lambda_=0.5), TypeError, ["'lambda_'", "ce_weight", "kd_weight"]),
    ("misspelt", replaced(temprature=4.0), TypeError, ["'temprature'", "'temperature'"]),
    ("unheard of", replaced(epsilon=4.0), TypeError, ["'epsilon'", "temperature", "num_valid"]),
    ("num_valid shape", replaced(num_valid=torch.ones(2)), ValueError, ["num_valid", "2"]),
    ("num_valid text", replaced(num_valid="all"), TypeError, ["num_valid", "str|'all'"]),
    ("num_valid NaN", replaced(num_valid=math.nan), ValueError, ["num_valid", "nan"]),
    ("num_valid negative", replaced(num_valid=-1), ValueError, ["num_valid", "-1"]),
    ("grad_scale shape", replaced(grad_scale=torch.ones(2)), ValueError, ["grad_scale", "2"]),
    ("grad_scale 0", replaced(grad_scale=0.0), ValueError, ["grad_scale", "0"]),
    ("grad_scale NaN", replaced(grad_scale=math.nan), ValueError, ["grad_scale", "nan"]),
    ("ignore_index float", replaced(ignore_index=1.5), TypeError, ["ignore_index", "1.5|float"]),
]


@pytest.mark.parametrize(("change", "error", "says"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
@pytest.mark.parametrize("function", [kd_loss, kd_loss_parts], ids=["kd_loss", "kd_loss_parts"])
def test_refused(function: Callable[..., Any], change: Change, error: type[Exception], says: list[str]) -> None:
    given = arguments()
    function(**given)
    change(given)
    positional = [given.pop(name) for name in ("student_logits", "teacher_logits", "target")]
    with pytest.raises(error) as raised:
        function(*positional, **given)
    message = str(raised.value)
    first, _, rest = message.partition("\n")
    for pattern in says:
        assert re.search(pattern, first), f"{pattern!r} not in {first!r}"
    assert "Exception raised from" not in rest, "a C++ stack trace for a user's mistake"


def test_temperature_as_the_third_argument_gets_a_hint() -> None:
    """mdistiller and others: kd_loss(logits_student, logits_teacher, temperature)."""
    given = arguments()
    calls: list[Callable[[], Any]] = [
        lambda: kd_loss(given["student_logits"], given["teacher_logits"], 4.0),  # type: ignore[arg-type]
        lambda: kd_loss(given["student_logits"], given["teacher_logits"], given["target"], 4.0),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=r"temperature\s*="):
            call()


@pytest.mark.parametrize(
    "function",
    [
        kd_loss,
        reference.kd_loss,
        reference.kd_logit_gradient,
        functional.kd_logit_gradient,
        functional.kd_moments,
        revision_loss,
        mlkd_loss,
        dist_loss,
    ],
    ids=lambda function: f"{function.__module__}.{function.__name__}",
)
def test_every_entry_point_wants_tensors_of_as_many_rows(function: Callable[..., Any]) -> None:
    z, v, y = arguments().values()
    rest = () if function is dist_loss else (y,)
    function(z, v, *rest)
    for output, way_out in ((Output(z), r"\.logits"), ((z, v), r"tuple.*\[0\]"), ({"out": z}, "dict.*'out'")):
        with pytest.raises(TypeError, match=f"student_logits must be a Tensor of logits; got .*{way_out}"):
            function(output, v, *rest)
        with pytest.raises(TypeError, match=f"teacher_logits must be a Tensor of logits; got .*{way_out}"):
            function(z, output, *rest)
    for rows in (5, 1, 0):
        with pytest.raises(ValueError, match=rf"teacher_logits must .*\(6, 10\).*\({rows}, 10\)"):
            function(z, v[:rows], *rest)


def test_entry_points_of_one_network_want_tensors() -> None:
    z, _, y = arguments().values()
    for call in (lambda x: revise_labels(x, y), lambda x: reference.revise_labels(x, y), lambda x: make_cached(x)):
        with pytest.raises(TypeError, match=r"logits must be a Tensor of logits; got Output; pass its \.logits"):
            call(Output(z))


def make_cached(logits: Any) -> TopKTeacher:
    return TopKTeacher.from_logits(logits, 3, temperature=4.0)


def test_images_with_their_classes_last() -> None:
    """(N, H, W, C) is taken as it is where the target's shape says so; a sequence as long as its vocabulary too."""
    for shape in ((3, 4, 4, 5), (2, 4, 4)):
        rows = kd_cases.rows(math.prod(shape[:-1]), shape[-1])
        logits, lead = (x.view(shape) for x in rows[:2]), shape[:-1]
        assert torch.equal(kd_loss(*logits, rows.target.view(lead)), kd_loss(*rows))


def test_recipes_none_is_none() -> None:
    given = arguments()
    for function in (kd_loss, reference.kd_loss, mlkd_loss):
        assert torch.equal(function(**given, revise="none"), function(**given, revise=None))
        assert not torch.equal(function(**given, revise="none"), function(**given))


def test_errors_come_before_any_work() -> None:
    """A bad target on the last row of many: an error, not a loss, with a gradient and without."""
    rows = kd_cases.rows(20000, 10)
    rows.target[19999] = 10
    for requires_grad in (False, True):
        student = rows.student.clone().requires_grad_(requires_grad)
        with pytest.raises(ValueError, match="19999"):
            kd_loss(student, rows.teacher, rows.target)


def test_the_first_bad_row_is_named_whatever_the_threads() -> None:
    rows = kd_cases.rows(20000, 10)
    rows.target[[123, 15000, 19999]] = torch.tensor([10, 11, 12])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with pytest.raises(ValueError, match=r"\b123\b.*\b10\b"):
                kd_loss(*rows)
    finally:
        torch.set_num_threads(threads)


def test_cached_argument_checks_still_detect_wrong_types() -> None:
    """Argument checks are cached by value; an equal value of another type is still an error."""
    given = arguments()
    checked: dict[str, Any] = {"ce_weight": 1.0, "ignore_index": 1, "standardize": True}
    for _ in range(2):
        kd_loss(**given, **checked)
        for name, wrong in (("ce_weight", True), ("ignore_index", True), ("ignore_index", 1.0), ("standardize", 1)):
            with pytest.raises(TypeError, match=name):
                kd_loss(**given, **(checked | {name: wrong}))
        with pytest.raises(ValueError, match="ce_weight"):
            kd_loss(**given, ce_weight=-1.0)
    several = [kd_loss(**given, temperature=t) for t in ([2.0, 4.0], (2.0, 4.0))]
    assert several[0] == several[1]
    second = kd_loss(**given, temperature=4.0, ce_weight=0.0, ce_weight_unselected=1.0)
    torch.testing.assert_close(several[0], kd_loss(**given, temperature=2.0) + second)


NUMBER_KINDS: list[Callable[[float], Any]] = [
    np.float64,
    np.float32,
    np.float16,
    np.array,
    torch.tensor,
    lambda value: torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64),
]


@pytest.mark.parametrize("kind", NUMBER_KINDS)
def test_numbers_of_numpy_and_tensors_without_dimensions(kind: Callable[[float], Any]) -> None:
    """They are accepted wherever a Python number is; all values here are exact in every type."""
    given = arguments()
    student, teacher, target = given.values()
    numbers: dict[str, Any] = dict(temperature=4.0, ce_weight=0.25, kd_weight=0.5, ce_weight_unselected=0.75)
    numbers |= dict(eta=0.625, revise_temperature=2.0, label_smoothing=0.125, num_valid=8.0, grad_scale=2.0)

    def of(kind: Callable[[float], Any]) -> dict[str, Any]:
        return {name: kind(value) for name, value in numbers.items()}

    whole: Callable[[int], Any] = np.int64 if isinstance(kind(1.0), np.generic) else kind
    expected = kd_loss(**given, **numbers, divergence=DKD(alpha=0.5, beta=2.0), ignore_index=3)
    divergence = DKD(alpha=kind(0.5), beta=kind(2.0))
    assert divergence == DKD(alpha=0.5, beta=2.0) and hash(divergence) == hash(DKD(alpha=0.5, beta=2.0))
    assert torch.equal(kd_loss(**given, **of(kind), divergence=divergence, ignore_index=whole(3)), expected)
    # What a module holds are Python's numbers.
    held = {name: value for name, value in numbers.items() if name not in ("num_valid", "grad_scale")}
    module = KDLoss(**{name: kind(value) for name, value in held.items()}, ignore_index=whole(3))
    assert repr(module) == repr(KDLoss(**held, ignore_index=3))
    assert torch.equal(kd_loss(**given, temperature=[kind(2.0), kind(4.0)]), kd_loss(**given, temperature=[2.0, 4.0]))
    assert torch.equal(revise_labels(teacher, target, eta=kind(0.5)), revise_labels(teacher, target, eta=0.5))
    losses: list[Callable[[Callable[[float], Any]], torch.Tensor]] = [
        lambda kind: dist_loss(student, teacher, beta=kind(0.5), gamma=kind(2.0), temperature=kind(4.0)),
        lambda kind: mlkd_loss(**given, batch_weight=kind(0.5), category_weight=kind(0.5), kd_weight=kind(0.5)),
        lambda kind: revision_loss(student, teacher, target, lambda1=kind(0.5), lambda2=kind(2.0), eta=kind(0.5)),
    ]
    for loss in losses:
        assert torch.equal(loss(kind), loss(float))


def test_tensor_arguments_are_read_at_every_call() -> None:
    """Argument checks are cached by value, but a tensor can change."""
    given = arguments()
    temperature = torch.tensor(2.0)
    for value in (2.0, 4.0, 8.0):
        temperature.fill_(value)
        forms: list[Any] = [temperature, (temperature,)]
        for changing in forms:
            assert torch.equal(kd_loss(**given, temperature=changing), kd_loss(**given, temperature=value))


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (np.bool_(True), "must be a number; got np.True_"),
        (torch.tensor(True), r"must be a number; got tensor\(True\)"),
        (torch.tensor([4.0]), r"must be a number; got tensor\(\[4.\]\)"),
        (np.array([4.0]), r"must be a number; got array\(\[4.\]\)"),
        (4j, "must be a number; got 4j"),
        (torch.tensor(4.0, requires_grad=True), "must not require a gradient: pass its .item()"),
    ],
)
def test_no_numbers(number: Any, says: str) -> None:
    for name in ("temperature", "ce_weight", "eta"):
        with pytest.raises(TypeError, match=f"{name} {says}"):
            kd_loss(**arguments(), **{name: number})


def test_accepted() -> None:
    """Legal values that a stricter reading might refuse."""
    given = arguments()
    for extra in (
        {"temperature": 1},
        {"ce_weight": 0, "kd_weight": 0},
        {"label_smoothing": 1.0},
        {"label_smoothing": 0},
        {"ignore_index": 3},
        {"num_valid": 0},
        {"num_valid": torch.tensor([4.0])},
        {"grad_scale": None, "num_valid": None},
        {"selected": torch.ones(6, 1).bool()[:, 0]},
        {"eta": 1e-6},
        {"revise_temperature": 1},
        {"revise_temperature": 1e3},
        {"eta": 1.0 - 1e-6},
    ):
        assert kd_loss(*given.values(), **extra).isfinite(), extra
