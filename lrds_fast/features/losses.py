"""torchdistill's losses with the regressors and embeddings that they need, behind one signature."""

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
    """The method's loss for features of these shapes, a module of float32 parameters on the CPU.

    Its forward takes (student features, teacher features, indices (K,), target (K,)), K rows each, and gives a 0-dim
    tensor. numbers: of feature_methods.values. num_samples, labels: as FeatureDistillation. ImportError without
    torchdistill.
    """
    mid_level, adaptation, wrapper = _library()
    channels = [(own[1], given[1]) for own, given in zip(student, teacher, strict=True)]
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
            wrapper.Regressor4VID(own, given, given, eps=min(1e-5, variance / 2), init_pred_var=variance)
            for own, given in channels
        ]
        return _Maps(mid_level.VIDLoss(pairs), regressors)
    if method == "ickd":
        embedding = wrapper.ChannelSimilarityEmbed(*channels[0])
        return _Maps(_TimesRows(mid_level.ChSimLoss(pairs)), [embedding], same_size=False)
    if method == "sp":
        similarity = mid_level.SPKDLoss("0", "0", "batchmean")
        # The paper's rows have Euclidean norm 1. torchdistill 1.1.5 divides them by the sum of absolute values, which
        # makes the loss smaller by about the batch size, and the published weight wrong.
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
    """Features by place as torchdistill's losses look them up."""
    return {str(k): {"output": value} for k, value in enumerate(features)}


def _pooled(features: Tensor) -> Tensor:
    """(N, d): maps (N, C, H, W) averaged over positions, tokens (N, T, d) over tokens."""
    if features.dim() == 4:
        return features.mean(dim=(2, 3))
    return features.mean(dim=1) if features.dim() == 3 else features


def _width(shape: torch.Size) -> int:
    """The d of _pooled."""
    return shape[1] if len(shape) == 4 else shape[-1]


def _one_size(own: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
    """Two maps, the larger averaged to the smaller one's height and width."""
    if own.shape[2:] != given.shape[2:]:
        size = (min(own.shape[2], given.shape[2]), min(own.shape[3], given.shape[3]))
        own, given = F.adaptive_avg_pool2d(own, size), F.adaptive_avg_pool2d(given, size)
    return own, given


def _similarities(features: Tensor) -> Tensor:
    """(N, N) inner products of the rows, each row of them divided by its norm (Tung & Mori 2019, eq. 2)."""
    rows = features.flatten(1)
    return F.normalize(rows @ rows.T, dim=1)


class _Maps(nn.Module):
    """A loss of maps, pair by pair; the student's behind a regressor where the method has one."""

    def __init__(self, loss: nn.Module, regressors: Sequence[nn.Module] = (), *, same_size: bool = True) -> None:
        super().__init__()
        self.loss = loss
        self.regressors = nn.ModuleList(regressors)
        self.same_size = same_size

    def forward(self, student: list[Tensor], teacher: list[Tensor], indices: Tensor, target: Tensor) -> Tensor:
        if self.same_size:
            sized = [_one_size(own, given) for own, given in zip(student, teacher, strict=True)]
            student, teacher = [own for own, _ in sized], [given for _, given in sized]
        if self.regressors:
            student = [regressor(own) for regressor, own in zip(self.regressors, student, strict=True)]
        # ChSimLoss views maps as (N, C, H * W), which channels_last strides do not allow.
        student, teacher = [[_plain(value) for value in features] for features in (student, teacher)]
        loss: Tensor = self.loss(_io(student), _io(teacher), target)
        return loss


def _plain(value: Any) -> Any:
    """Contiguous; VID's regressor gives a pair, which stays."""
    return value.contiguous() if isinstance(value, Tensor) else value


class _TimesRows(nn.Module):
    """The mean over rows of a loss that is divided by their number twice, as ICKD's ImageNet code and torchdistill do;
    the published weight is that of the mean."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, student: dict[str, Any], teacher: dict[str, Any], target: Tensor) -> Tensor:
        loss: Tensor = self.loss(student, teacher) * len(target)
        return loss


class _Embeddings(nn.Module):
    """A loss of one vector a row; both behind linear layers where the method has them."""

    def __init__(self, loss: nn.Module, heads: Sequence[nn.Module] = ()) -> None:
        super().__init__()
        self.loss = loss
        self.heads = nn.ModuleList(heads)

    def forward(self, student: list[Tensor], teacher: list[Tensor], indices: Tensor, target: Tensor) -> Tensor:
        own, given = _pooled(student[0]), _pooled(teacher[0])
        if self.heads:
            own, given = self.heads[0](own), self.heads[1](given)
        loss: Tensor = self.loss(_io([own]), _io([given]), target)
        return loss


class _Review(nn.Module):
    """ReviewKD: from the deepest place to the shallowest, the student's map fused with the deeper ones and compared."""

    def __init__(
        self, mid_level: Any, wrapper: Any, channels: Sequence[tuple[int, int]], numbers: Mapping[str, float]
    ) -> None:
        super().__init__()
        width = min(int(numbers["width"]), channels[-1][0])
        self.fusions = nn.ModuleList(
            wrapper.AttentionBasedFusion(own, width, given, uses_attention=k < len(channels) - 1)
            for k, (own, given) in enumerate(channels)
        )
        self.loss = mid_level.HierarchicalContextLoss("0", "output", "0", "output")

    def forward(self, student: list[Tensor], teacher: list[Tensor], indices: Tensor, target: Tensor) -> Tensor:
        total: Tensor | None = None
        residual: Tensor | None = None
        for fusion, own, given in zip(reversed(self.fusions), reversed(student), reversed(teacher), strict=True):
            own, given = (value if value.dim() == 4 else value[:, :, None, None] for value in (own, given))
            fused, residual = fusion(own, residual, own.shape[-1])
            fused, given = _one_size(fused, given)
            level = self.loss(_io([(fused, residual)]), _io([given]), target)
            total = level if total is None else total + level
        if total is None:
            raise RuntimeError("ReviewKD without places")
        return total


class _Contrast(nn.Module):
    """CRD: each row's embeddings against those of other samples, which a memory bank holds of both networks."""

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
        # With one row: CRDLoss prepares the drawing of negatives of its own row by row, which takes 15 s for ImageNet
        # and is not used here.
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
        # Without labels every sample is a class of its own.
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
        own, given = self.heads[0](_pooled(student[0])), self.heads[1](_pooled(teacher[0]))
        contrast = torch.cat([indices[:, None], self._others(indices)], dim=1)
        row = {"0": {"output": own}, "index": {"input": {"pos_idx": indices, "contrast_idx": contrast}}}
        loss: Tensor = self.loss(row, _io([given]), target)
        return loss.squeeze()

    def _others(self, indices: Tensor) -> Tensor:
        """(K, negatives) samples of other classes than the rows', uniformly and with replacement: a draw among all but
        the class, counted in an order in which every class is a run, with a jump over the row's own."""
        own = self.classes[indices]
        starts, counts = self.starts[own][:, None], self.counts[own][:, None]
        draws = torch.rand(len(indices), self.negatives, device=indices.device, dtype=torch.float64)
        places = (draws * (len(self.order) - counts)).long()
        return self.order[torch.where(places < starts, places, places + counts)]
