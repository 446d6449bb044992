"""torchdistill's losses, with the regressors and embeddings that they need, behind one signature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _library() -> tuple[Any, Any, Any]:
    """torchdistill's losses, regressors and auxiliary modules."""
    try:
        from torchdistill.losses import mid_level
        from torchdistill.models import adaptation, wrapper
    except ImportError as error:
        raise ImportError(f"features.method needs torchdistill: pip install torchdistill ({error})") from error
    return mid_level, adaptation, wrapper


def criterion(
    method: str,
    student: Sequence[torch.Size],
    teacher: Sequence[torch.Size],
    numbers: Mapping[str, float],
    num_samples: int,
    labels: Tensor | None,
) -> nn.Module:
    """The method's loss for features of these shapes: a module with float32 parameters on the CPU.

    Its forward takes (student features, teacher features, indices (K,), target (K,)), all with K rows, and returns a
    0-dim tensor. numbers: the method's options, see feature_methods.values. num_samples, labels: see
    FeatureDistillation. ImportError without torchdistill.
    """
    mid_level, adaptation, wrapper = _library()
    channels = [(ours[1], theirs[1]) for ours, theirs in zip(student, teacher, strict=True)]
    widths = _width(student[0]), _width(teacher[0])
    pairs = {
        str(k): {role: {"io": "output", "path": str(k)} for role in ("student", "teacher")}
        for k in range(len(channels))
    }
    if method == "fitnet":
        regressors = [adaptation.ConvReg(*channels[0], kernel_size=1, stride=1, padding=0)]
        mse = mid_level.SimpleLossWrapper(
            nn.MSELoss(),
            input={"is_from_teacher": False, "module_path": "0", "io": "output"},
            target={"is_from_teacher": True, "module_path": "0", "io": "output"},
        )
        return _Maps(mse, regressors)
    if method == "at":
        return _Maps(mid_level.ATLoss(pairs, mode="code"))
    if method == "vid":
        variance = numbers["variance"]
        regressors = [
            wrapper.Regressor4VID(ours, theirs, theirs, eps=min(1e-5, variance / 2), init_pred_var=variance)
            for ours, theirs in channels
        ]
        return _Maps(mid_level.VIDLoss(pairs), regressors)
    if method == "ickd":
        embedding = wrapper.ChannelSimilarityEmbed(*channels[0])
        return _Maps(_TimesRows(mid_level.ChSimLoss(pairs)), [embedding], same_size=False)
    if method == "sp":
        similarity = mid_level.SPKDLoss("0", "0", "batchmean")
        # The paper's rows have Euclidean norm 1. torchdistill 1.1.5 divides them by the sum of absolute values. That
        # makes the loss smaller by about the batch size, for which the published weight is wrong.
        similarity.matmul_and_normalize = _similarities
        return _Maps(similarity, same_size=False)
    if method == "reviewkd":
        return _Review(mid_level, wrapper, channels, numbers)
    if method == "rkd":
        return _Embeddings(mid_level.RKDLoss("0", "0", numbers["distance"], numbers["angle"], "mean"))
    if method == "pkt":
        return _Embeddings(mid_level.PKTLoss("0", "output", "0", "output"))
    size = int(numbers["size"])
    if method == "cc":
        kernel = {"type": "gaussian", "gamma": numbers["gamma"], "max_p": int(numbers["order"])}
        heads = [nn.Linear(width, size) for width in widths]
        return _Embeddings(mid_level.CCKDLoss("0", "0", kernel, "batchmean"), heads)
    heads = [wrapper.Normalizer4CRD(nn.Linear(width, size)) for width in widths]
    return _Contrast(mid_level, heads, numbers, num_samples, labels)


def _io(features: Sequence[Any]) -> dict[str, dict[str, Any]]:
    """Features in the dictionary from which torchdistill's losses take them."""
    return {str(k): {"output": value} for k, value in enumerate(features)}


def _pooled(features: Tensor) -> Tensor:
    """(N, d): the mean over positions of maps (N, C, H, W), over tokens of (N, T, d); vectors stay."""
    if features.dim() == 4:
        return features.mean(dim=(2, 3))
    return features.mean(dim=1) if features.dim() == 3 else features


def _width(shape: torch.Size) -> int:
    """The d of _pooled."""
    return shape[1] if len(shape) == 4 else shape[-1]


def _one_size(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """Both maps (N, C, H, W), averaged to the smaller height and width."""
    if ours.shape[2:] != theirs.shape[2:]:
        size = (min(ours.shape[2], theirs.shape[2]), min(ours.shape[3], theirs.shape[3]))
        ours, theirs = F.adaptive_avg_pool2d(ours, size), F.adaptive_avg_pool2d(theirs, size)
    return ours, theirs


def _similarities(features: Tensor) -> Tensor:
    """(N, N): inner products between the rows, each row divided by its Euclidean norm (Tung & Mori 2019, eq. 2)."""
    rows = features.flatten(1)
    return F.normalize(rows @ rows.T, dim=1)


class _Maps(nn.Module):
    """A loss of pairs of maps; regressors, if the method has them, transform the student's."""

    def __init__(self, loss: nn.Module, regressors: Sequence[nn.Module] = (), *, same_size: bool = True) -> None:
        super().__init__()
        self.loss = loss
        self.regressors = nn.ModuleList(regressors)
        self.same_size = same_size

    def forward(self, student: list[Tensor], teacher: list[Tensor], indices: Tensor, target: Tensor) -> Tensor:
        if self.same_size:
            sized = [_one_size(ours, theirs) for ours, theirs in zip(student, teacher, strict=True)]
            student, teacher = [ours for ours, _ in sized], [theirs for _, theirs in sized]
        if self.regressors:
            student = [regressor(value) for regressor, value in zip(self.regressors, student, strict=True)]
        # ChSimLoss views maps as (N, C, H * W), which channels_last strides do not allow.
        student, teacher = [[_contiguous(value) for value in features] for features in (student, teacher)]
        loss: Tensor = self.loss(_io(student), _io(teacher), target)
        return loss


def _contiguous(value: Any) -> Any:
    """A contiguous tensor; the pair that VID's regressor returns stays as it is."""
    return value.contiguous() if isinstance(value, Tensor) else value


class _TimesRows(nn.Module):
    """Turns a loss that is divided by the number of rows twice, as in ICKD's ImageNet code and in torchdistill, into
    the mean over rows, to which the published weight belongs."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, student: dict[str, Any], teacher: dict[str, Any], target: Tensor) -> Tensor:
        loss: Tensor = self.loss(student, teacher) * len(target)
        return loss


class _Embeddings(nn.Module):
    """A loss of one vector per row, behind linear layers (heads) if the method has them."""

    def __init__(self, loss: nn.Module, heads: Sequence[nn.Module] = ()) -> None:
        super().__init__()
        self.loss = loss
        self.heads = nn.ModuleList(heads)

    def forward(self, student: list[Tensor], teacher: list[Tensor], indices: Tensor, target: Tensor) -> Tensor:
        ours, theirs = _pooled(student[0]), _pooled(teacher[0])
        if self.heads:
            ours, theirs = self.heads[0](ours), self.heads[1](theirs)
        loss: Tensor = self.loss(_io([ours]), _io([theirs]), target)
        return loss


class _Review(nn.Module):
    """ReviewKD: from the deepest stage to the shallowest, the student's map is fused with the deeper ones and compared
    with the teacher's."""

    def __init__(
        self, mid_level: Any, wrapper: Any, channels: Sequence[tuple[int, int]], numbers: Mapping[str, float]
    ) -> None:
        super().__init__()
        width = min(int(numbers["width"]), channels[-1][0])
        self.fusions = nn.ModuleList(
            wrapper.AttentionBasedFusion(ours, width, theirs, uses_attention=k < len(channels) - 1)
            for k, (ours, theirs) in enumerate(channels)
        )
        self.loss = mid_level.HierarchicalContextLoss("0", "output", "0", "output")

    def forward(self, student: list[Tensor], teacher: list[Tensor], indices: Tensor, target: Tensor) -> Tensor:
        total: Tensor | None = None
        residual: Tensor | None = None
        for fusion, ours, theirs in zip(reversed(self.fusions), reversed(student), reversed(teacher), strict=True):
            ours, theirs = (value if value.dim() == 4 else value[:, :, None, None] for value in (ours, theirs))
            fused, residual = fusion(ours, residual, ours.shape[-1])
            fused, theirs = _one_size(fused, theirs)
            level = self.loss(_io([(fused, residual)]), _io([theirs]), target)
            total = level if total is None else total + level
        if total is None:
            raise RuntimeError("ReviewKD needs features of at least one module; got none")
        return total


class _Contrast(nn.Module):
    """CRD: contrasts each row's embedding with those of other samples, from a memory bank of both networks."""

    def __init__(
        self,
        mid_level: Any,
        heads: Sequence[nn.Module],
        numbers: Mapping[str, float],
        num_samples: int,
        labels: Tensor | None,
    ) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)
        self.negatives = int(numbers["negatives"])
        size = int(numbers["size"])
        # output_size=1: CRDLoss prepares its own sampling of negatives per output row. That takes 15 s for ImageNet,
        # and this class samples by itself.
        self.loss = mid_level.CRDLoss(
            "0",
            "index",
            "0",
            input_size=size,
            output_size=1,
            num_negative_samples=self.negatives,
            num_samples=num_samples,
            temperature=numbers["temperature"],
            momentum=numbers["momentum"],
        )
        bound = (3.0 / size) ** 0.5
        self.loss.memory_v1 = torch.empty(num_samples, size).uniform_(-bound, bound)
        self.loss.memory_v2 = torch.empty(num_samples, size).uniform_(-bound, bound)
        # Without labels, every sample is a class by itself.
        classes = torch.arange(num_samples) if labels is None else labels.cpu().long()
        counts = torch.bincount(classes)
        if int(counts.max()) == num_samples:
            raise ValueError("features.method 'crd' needs training samples of two classes or more")
        for name, facts in (
            ("order", classes.argsort(stable=True)),
            ("counts", counts),
            ("starts", counts.cumsum(0) - counts),
            ("classes", classes),
        ):
            self.register_buffer(name, facts, persistent=False)
        self.order: Tensor
        self.counts: Tensor
        self.starts: Tensor
        self.classes: Tensor

    def forward(self, student: list[Tensor], teacher: list[Tensor], indices: Tensor, target: Tensor) -> Tensor:
        ours, theirs = self.heads[0](_pooled(student[0])), self.heads[1](_pooled(teacher[0]))
        contrast = torch.cat([indices[:, None], self._others(indices)], dim=1)
        row = {"0": {"output": ours}, "index": {"input": {"pos_idx": indices, "contrast_idx": contrast}}}
        loss: Tensor = self.loss(row, _io([theirs]), target)
        return loss.squeeze()

    def _others(self, indices: Tensor) -> Tensor:
        """(K, negatives) int64: samples of other classes than each row's, uniform, with replacement.

        In `order` the samples are sorted by class. A position is drawn among all but the row's class; positions from
        the start of this class on are shifted by its size."""
        classes = self.classes[indices]
        starts, counts = self.starts[classes][:, None], self.counts[classes][:, None]
        draws = torch.rand(len(indices), self.negatives, device=indices.device, dtype=torch.float64)
        places = (draws * (len(self.order) - counts)).long()
        return self.order[torch.where(places < starts, places, places + counts)]
