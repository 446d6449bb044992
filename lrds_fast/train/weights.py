"""Weights of any file: found wherever they lie in it, read without running code, refused by name where none fit."""

from __future__ import annotations

import argparse
import codecs
import pickle
import re
import sys
import warnings
import zipfile
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lrds_fast.influence.ranks import Ranks

# What published checkpoints hold beside tensors: options as argparse leaves them, accuracies as NumPy scalars. None of
# these runs anything when it is unpickled.
_HARMLESS: list[Any] = [
    argparse.Namespace,
    np.dtype,
    *{type(np.dtype(code)) for code in "?bBhHiIlLqQefd"},
    *(
        (np.float64(0).__reduce__()[0], f"{module}.multiarray.scalar")  # its name before and since NumPy 2
        for module in ("numpy.core", "numpy._core")
    ),
]

# Names that wrappers put between a module and its parent, wherever in the network they were applied.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# state_dict_ema, model_ema, ema.module, params_ema, averaged_model, modelEMA, ...; not schema, avgpool.
_AVERAGE = re.compile(r"(?<![a-z])(?:ema|swa|avg|averaged?)(?![a-z])|(?:EMA|Ema|SWA)(?![a-z])")

_COUNTER = "num_batches_tracked"

_PREFIX_OF_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"  # torch.save's before 1.6
_FOREIGN = {
    b"\x1f\x8b": "a gzip archive: unpack it, and name the file that was in it",
    b"BZh": "a bzip2 archive: unpack it, and name the file that was in it",
    b"\xfd7zXZ": "an xz archive: unpack it, and name the file that was in it",
    b"7z\xbc\xaf": "a 7z archive: unpack it, and name the file that was in it",
    b"\x89HDF": "an HDF5 file (of Keras?): save the network's state_dict() from PyTorch",
    b"\x93NUMPY": "a NumPy array: save the network's state_dict() from PyTorch",
}
_SAVE_THE_STATE = "in the program that made it, save the weights alone: torch.save(model.state_dict(), FILE)"


def load_weights(model: nn.Module, path: Path, *, key: str, weights: str = "average") -> None:
    """Fills `model` from a file of torch.save or safetensors that holds all of its weights, under whatever names.

    The weights may lie at any depth of dicts and lists, and their names may have any prefix in common. Where raw and
    averaged weights (EMA, SWA) fit, `weights` says which are taken, and a line on stderr how to have the others.
    key: the recipe key that named the file. Raises FileNotFoundError where there is none, ValueError for a file of
    another kind or another model, with numbers that are not finite, and where several sets of weights fit.
    """
    if path.is_dir():
        raise ValueError(f"{key}: {path} is a folder; name the file of weights in it")
    if not path.is_file():
        raise FileNotFoundError(f"{key}: there is no file {path}; train it first, or correct the path")
    where = f"{key}: {path}"
    content = read(path, named=where, otherwise="copy or download it again")
    option = "teacher.weights" if key.startswith("teacher.") else "student.weights"
    sets = _fitting(model, content, where)
    averages, raw = [found for found in sets if found.average], [found for found in sets if not found.average]
    if weights == "raw" and not raw:
        raise ValueError(f"{where} holds averaged weights alone ({averages[0].place}); set {option}=average")
    taken, others = (raw, averages) if weights == "raw" or not averages else (averages, raw)
    if any(not taken[0].equals(another) for another in taken[1:]):
        raise ValueError(
            f"{where} holds several sets of weights that fit ({', '.join(found.place for found in taken)});"
            " take the one that you mean out of what torch.load(FILE) gives, and torch.save it in a file of its own"
        )
    if others and Ranks.current().first:
        kinds = ("average", "raw") if taken is averages else ("raw", "average")
        print(
            f"lrds-fast: {where} holds raw and averaged weights: took the {kinds[0]} ({taken[0].place});"
            f" {option}={kinds[1]} takes the other ({others[0].place})",
            file=sys.stderr,
        )
    broken = [entry.name for entry in taken[0].entries.values() if not bool(entry.tensor.isfinite().all())]
    if broken:
        raise ValueError(
            f"{where} has NaN or infinite numbers in {_some(broken)}: its training diverged, or the file is damaged;"
            " take an earlier checkpoint"
        )
    taken[0].fill(model)


def load_state(model: nn.Module, state: Any, where: str) -> None:
    """Fills `model` from a state dict, or raises ValueError, which begins with `where`, with what differs."""
    _fitting(model, state, where)[0].fill(model)


def read(path: Path, *, named: str, otherwise: str) -> Any:
    """What is in a file of torch.save or safetensors, on the CPU; no code in it is run.

    Raises ValueError, which begins with `named`, with what the file is instead; `otherwise`: what to do about a damaged
    one.
    """
    with path.open("rb") as file:
        head = file.read(1024)
    try:
        if _is_safetensors(head):
            from safetensors.torch import load_file

            return load_file(path)
        # An open file: by a path, torch.load goes by its suffix.
        with path.open("rb") as file, torch.serialization.safe_globals(_HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles that are refused below
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged zip raises RuntimeError, EOFError, OSError or KeyError, by where it was cut
        raise ValueError(f"{named} is {_kind(path, head, error, otherwise)}") from error


@dataclass(eq=False)
class _Entry:
    """A tensor of the file. container: the dict that it lies in. name: from the file's root, the container included."""

    container: str
    name: str
    tensor: Tensor


@dataclass
class _Weights:
    """What a file has of the model under one prefix. entries: by the model's names. surplus: what else is there."""

    prefix: str
    entries: dict[str, _Entry] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    surplus: list[str] = field(default_factory=list)
    average: bool = False

    @property
    def place(self) -> str:
        """Where in the file they are."""
        return self.prefix.rstrip(".") or "its top level"

    def equals(self, other: _Weights) -> bool:
        """Whether both are the same numbers, as those of a network that the file has under two names."""
        if self.entries.keys() != other.entries.keys():
            return False
        pairs = [(entry.tensor, other.entries[name].tensor) for name, entry in self.entries.items()]
        return all(mine.dtype == theirs.dtype and torch.equal(mine, theirs) for mine, theirs in pairs)

    def unlike(self, own: Mapping[str, Tensor]) -> list[str]:
        """Names of the tensors that have another shape than the model's."""
        return [name for name, entry in self.entries.items() if entry.tensor.shape != own[name].shape]

    def fill(self, model: nn.Module) -> None:
        """load_state_dict, by the names that the model itself has."""
        names = {_plain(name): name for name in model.state_dict()}
        # A plain dict has no layout version; PyTorch's batch norms then accept a state without their counters.
        model.load_state_dict({names[name]: entry.tensor for name, entry in self.entries.items()})


def _fitting(model: nn.Module, content: Any, where: str) -> list[_Weights]:
    """All sets of weights in `content` that fit the model; ValueError where there are none."""
    own = {_plain(name): value for name, value in model.state_dict().items()}
    entries = list(_tensors(content))
    if not entries:
        raise ValueError(f"{where} holds no state dict of tensors; it holds {_outline(content)}")
    found = _by_prefix(entries, own)
    complete = [weights for weights in found if not weights.missing]
    claimed = {entry for weights in complete for entry in weights.entries.values()}
    candidates = complete or [max(found, key=lambda weights: len(weights.entries))]
    for weights in candidates:
        _judge(weights, entries, claimed.union(weights.entries.values()))
    named = [weights for weights in complete if not weights.surplus]
    fitting = [weights for weights in named if not weights.unlike(own)]
    if fitting:
        return fitting
    if named:
        raise ValueError(f"{where} is of another model: {_shapes(named[0], own)}")
    nearest = min(candidates, key=lambda weights: len(weights.surplus))
    differences = [f"lacks {_some(nearest.missing)}"] if nearest.missing else []
    differences += [f"has {_some(nearest.surplus)}, which the model has not"] if nearest.surplus else []
    raise ValueError(
        f"{where} is of another model: it {' and '.join(differences)}; the file holds {_inventory(entries)};"
        " name the model it was saved from"
    )


def _tensors(content: Any) -> Iterator[_Entry]:
    """Every tensor in dicts and lists; a dict that is there twice comes once."""
    seen: set[int] = set()
    waiting = deque([("", content)])
    while waiting:
        container, value = waiting.popleft()
        if not isinstance(value, (Mapping, list, tuple)) or id(value) in seen:
            continue
        seen.add(id(value))
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            if isinstance(item, Tensor):
                yield _Entry(container, _plain(f"{container}{key}"), item)
            else:
                waiting.append((_plain(f"{container}{key}."), item))


def _by_prefix(entries: list[_Entry], own: Mapping[str, Tensor]) -> list[_Weights]:
    """By every prefix that names in the file have before one of the model's names."""
    found: dict[str, _Weights] = {}
    for entry in entries:
        start = 0
        while start >= 0:
            name = entry.name[start:]
            if name in own:
                prefix = entry.name[:start]
                found.setdefault(prefix, _Weights(prefix)).entries.setdefault(name, entry)
            start = entry.name.find(".", start) + 1 or -1
    if not found:  # no name in common: the differences are told of the largest dict
        containers = [entry.container for entry in entries]
        largest = max(containers, key=containers.count)
        found[largest] = _Weights(largest)
    for weights in found.values():
        # PyTorch loads files without these counters too; only batch norms with a momentum of None read them.
        weights.missing = [name for name in own if name not in weights.entries and name.rpartition(".")[2] != _COUNTER]
    return list(found.values())


def _judge(weights: _Weights, entries: list[_Entry], claimed: set[_Entry]) -> None:
    """Fills in whether the weights are an average, and what else their dicts have under their prefix.

    claimed: the entries of this set of weights, and of others that the model could be filled from.
    """
    prefix = weights.prefix
    averaged = prefix.removesuffix("module.") + "n_averaged"  # torch.optim.swa_utils.AveragedModel's
    weights.average = _AVERAGE.search(prefix) is not None or any(entry.name == averaged for entry in entries)
    containers = {entry.container for entry in weights.entries.values()} or {prefix}
    weights.surplus = [
        entry.name[len(prefix) :]
        for entry in entries
        if entry.container in containers and entry.name.startswith(prefix) and entry not in claimed
    ]


def _plain(name: str) -> str:
    return _WRAPPERS.sub("", name)


def _shapes(weights: _Weights, own: Mapping[str, Tensor]) -> str:
    """The first tensor of another shape, and the likely reason."""
    names = weights.unlike(own)
    shapes = [(tuple(weights.entries[name].tensor.shape), tuple(own[name].shape)) for name in names]
    theirs, ours = shapes[0]
    said = f"{names[0]} has shape {theirs}, the model's has {ours}"
    said += f", and {len(names) - 1} more differ" if len(names) > 1 else ""
    if theirs and ours and all((a[:1], b[:1], a[1:]) == (theirs[:1], ours[:1], b[1:]) for a, b in shapes):
        return (
            f"{said}; the class counts differ: it was trained on {theirs[0]} classes, and the model here has {ours[0]};"
            " take weights for the same classes"
        )
    return f"{said}; the widths or the input sizes differ: name the model it was saved from"


def _some(names: list[str], limit: int = 3) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(repr(name) for name in names[:limit]) + more


def _inventory(entries: list[_Entry]) -> str:
    """The largest dicts of tensors in the file, with the first name in each."""
    groups: dict[str, list[_Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.container, []).append(entry)
    largest = sorted(groups.items(), key=lambda group: -len(group[1]))
    said = [
        f"{len(members)} tensors in {container.rstrip('.') or 'its top level'} ({members[0].name[len(container) :]!r}"
        f"{', ...' if len(members) > 1 else ''})"
        for container, members in largest[:3]
    ]
    return ", ".join(said) + (f" and {len(largest) - 3} more dicts" if len(largest) > 3 else "")


def _outline(content: Any) -> str:
    if isinstance(content, Mapping) and content:
        return f"a dict of {_some([str(key) for key in content], 8)}"
    return f"an object of type {type(content).__name__}"


def _is_safetensors(head: bytes) -> bool:
    """The length of its header, at most 100 MB, and the header: JSON."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= 100_000_000


def _kind(path: Path, head: bytes, error: Exception, otherwise: str) -> str:
    """What a file is that could not be read, and the way out."""
    if not head:
        return f"empty (0 bytes); {otherwise}"
    if _is_safetensors(head):
        return f"a damaged safetensors file (cut short?); {otherwise}"
    if head.startswith(b"version https://git-lfs"):
        return "a git-LFS pointer, which stands for the weights; fetch them: git lfs pull"
    if head.removeprefix(codecs.BOM_UTF8).lstrip().lower().startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        return "a web page (HTML or XML), not weights; download the file itself, by its raw or direct link"
    for magic, name in _FOREIGN.items():
        if head.startswith(magic):
            return name
    unsafe = re.search(r"GLOBAL (\S+)", str(error))
    if unsafe:
        what = "a whole pickled module" if _is_module(path) else "a pickled object"
        return (
            f"not a checkpoint of tensors alone: it holds {what}, which needs the code of {unsafe[1]}, and no code is"
            f" run from a file; {_SAVE_THE_STATE}"
        )
    if head.startswith(b"PK"):
        return _kind_of_zip(path, error, otherwise)
    if head.startswith(b"\x80") and not head.startswith(_PREFIX_OF_TORCH):
        return f"a plain pickle, not a file of torch.save; {_SAVE_THE_STATE}"
    text = _text(head)
    if text:
        return f"a text file, which begins {text.strip().splitlines()[0][:40]!r}, not weights; correct the path"
    return f"damaged (cut short?), or neither a file of torch.save nor safetensors; {otherwise}"


def _kind_of_zip(path: Path, error: Exception, otherwise: str) -> str:
    if not zipfile.is_zipfile(path):
        return f"damaged: it is a zip archive that is cut short; {otherwise}"
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any(name.endswith("/constants.pkl") for name in names):
        return (
            "a TorchScript program, not a checkpoint of tensors alone; save its weights:"
            " torch.save(torch.jit.load(FILE).state_dict(), OTHER)"
        )
    if not any(name.endswith("/data.pkl") for name in names):
        return f"a zip archive of other files ({_some(names)}); unpack it, and name the file of weights"
    if isinstance(error, pickle.UnpicklingError):
        return f"not a checkpoint of tensors alone, or damaged; {_SAVE_THE_STATE}"
    return f"damaged; {otherwise}"


def _is_module(path: Path) -> bool:
    """Whether an nn.Module was pickled, by the names of what each of them has."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            pickles = [archive.read(name) for name in archive.namelist() if name.endswith("/data.pkl")]
    else:
        with path.open("rb") as file:
            pickles = [file.read(1 << 22)]
    return any(b"_modules" in content and b"_parameters" in content for content in pickles)


def _text(head: bytes) -> str:
    """The beginning of a text file; "" where it is none."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return ""
    return text if text.strip() and all(letter.isprintable() or letter.isspace() for letter in text) else ""
