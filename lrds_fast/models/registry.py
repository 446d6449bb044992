"""The networks' names: the CIFAR families of the literature, small ones, and those of torchvision and timm."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial

from lrds_fast.models.classifier import Classifier
from lrds_fast.models.external import External
from lrds_fast.models.mobilenet_cifar import MobileNetV2
from lrds_fast.models.resnet_cifar import CifarResNet
from lrds_fast.models.resnet_imagenet_cifar import BasicBlock, Bottleneck, ImageNetResNet
from lrds_fast.models.shufflenet_cifar import ShuffleNetV1, ShuffleNetV2
from lrds_fast.models.small import MLP, SmallCNN
from lrds_fast.models.vgg_cifar import DEPTHS, CifarVGG
from lrds_fast.models.wrn_cifar import WideResNet

_BUILDERS: dict[str, Callable[..., Classifier]] = {
    "mlp": MLP,
    **{f"mlp_8x16_{width}": partial(MLP, inputs=8 * 16, width=width) for width in (32, 128)},
    "small_cnn": SmallCNN,
    **{f"resnet{depth}": partial(CifarResNet, depth, (16, 16, 32, 64)) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{depth}x4": partial(CifarResNet, depth, (32, 64, 128, 256)) for depth in (8, 32)},
    **{
        f"wrn_{depth}_{widen}": partial(WideResNet, depth, widen)
        for depth, widen in ((16, 1), (16, 2), (40, 1), (40, 2))
    },
    **{name: partial(CifarVGG, depths) for name, depths in DEPTHS.items()},
    "ResNet18": partial(ImageNetResNet, BasicBlock, (2, 2, 2, 2)),
    "ResNet50": partial(ImageNetResNet, Bottleneck, (3, 4, 6, 3)),
    "MobileNetV2": MobileNetV2,
    "ShuffleV1": ShuffleNetV1,
    "ShuffleV2": ShuffleNetV2,
}

# Other spellings, in any case, as papers have them.
_OTHER_NAMES = {name.lower(): name for name in _BUILDERS} | {
    "shufflenetv1": "ShuffleV1",
    "shufflenetv2": "ShuffleV2",
}


def names() -> list[str]:
    """The names of the networks that need no other library."""
    return sorted(_BUILDERS)


def create(name: str, *, num_classes: int = 100) -> Classifier | External:
    """A new network with random weights.

    name: one of names() in any case, `torchvision:NAME` or `timm:NAME`. num_classes: number of logits, >= 1.
    Calling the network gives (N, num_classes) logits; .features(images) the (N, d) input of its last linear layer;
    .forward_with_features(images) both. Raises ValueError for an unknown name and ImportError where the library that
    a prefix names is missing.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1; got {num_classes}")
    library, colon, foreign = name.partition(":")
    if colon:
        return _external(library, foreign, num_classes)
    name = _OTHER_NAMES.get(name.lower(), name)
    if name not in _BUILDERS:
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f"did you mean {near[0]!r}?" if near else "see lrds_fast.models.names(), or torchvision:NAME, timm:NAME"
        raise ValueError(f"unknown model {name!r}; {hint}")
    return _BUILDERS[name](num_classes=num_classes)


def library_names(library: str) -> list[str]:
    """The names of the networks of torchvision or timm.

    ValueError for another library, ImportError for a missing one."""
    if library == "torchvision":
        try:
            from torchvision import models as torchvision_models
        except ImportError as error:
            raise ImportError(f"torchvision's models need torchvision: pip install torchvision ({error})") from error
        known: list[str] = torchvision_models.list_models(module=torchvision_models)
        return known
    if library == "timm":
        try:
            import timm
        except ImportError as error:
            raise ImportError(f"timm's models need timm: pip install timm ({error})") from error
        listed: list[str] = timm.list_models()
        return listed
    raise ValueError(f"unknown model library {library!r}; use torchvision: or timm:")


def _external(library: str, name: str, num_classes: int) -> External:
    known = library_names(library)
    # timm also knows names with a tag of weights, such as resnet18.a1_in1k, which its list leaves out.
    base = name.partition(".")[0] if library == "timm" else name
    if base not in known:
        near = difflib.get_close_matches(name, known, n=1)
        raise ValueError(f"{library} has no model {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    if library == "torchvision":
        from torchvision import models as torchvision_models

        return External(torchvision_models.get_model(name, num_classes=num_classes), f"torchvision:{name}")
    import timm

    return External(timm.create_model(name, num_classes=num_classes), f"timm:{name}")
