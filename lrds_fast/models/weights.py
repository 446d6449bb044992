"""Reads weights from checkpoint files of any layout, without running the code in them; writes safetensors."""

from __future__ import annotations

import argparse
import codecs
import json
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

from lrds_fast.ranks import Ranks

# Types in published checkpoints besides tensors: argparse options, NumPy scalars. Unpickling them runs no code.
_HARMLESS: list[Any] = [
    argparse.Namespace,
    np.dtype,
    *{type(np.dtype(code)) for code in "?bBhHiIlLqQefd"},
    *(
        (np.float64(0).__reduce__()[0], f"{module}.multiarray.scalar")  # its name before and since NumPy 2
        for module in ("numpy.core", "numpy._core")
    ),
]

# Names that wrappers insert between a module and its parent, at any depth of the network.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# state_dict_ema, model_ema, ema.module, params_ema, averaged_model, modelEMA, ...; not schema, avgpool.
_AVERAGE = re.compile(r"(?<![a-z])(?:ema|swa|avg|averaged?)(?![a-z])|(?:EMA|Ema|SWA)(?![a-z])")

_COUNTER = "num_batches_tracked"

_PREFIX_OF_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"  # torch.save's before 1.6
_FOREIGN = {
    b"\x1f\x8b": "a gzip archive: unpack it, and name the file in it",
    b"BZh": "a bzip2 archive: unpack it, and name the file in it",
    b"\xfd7zXZ": "an xz archive: unpack it, and name the file in it",
    b"7z\xbc\xaf": "a 7z archive: unpack it, and name the file in it",
    b"\x89HDF": "an HDF5 file (of Keras?): save the network's state_dict() from PyTorch",
    b"\x93NUMPY": "a NumPy array: save the network's state_dict() from PyTorch",
}
_SAVE_THE_STATE = "in the program that made it, save the weights alone: torch.save(model.state_dict(), FILE)"


def load_weights(model: nn.Module, path: Path, *, key: str, weights: str = "average", announce: bool = True) -> None:
    """Loads the weights of `model` from a file of torch.save or safetensors.

    The weights may be nested in dicts and lists at any depth, and their names may have a common prefix. `weights`
    chooses between raw and averaged weights (EMA, SWA) where both fit; with `announce` a line on stderr reports the
    choice. key: the recipe key of the file, for messages. Raises FileNotFoundError for a missing file, and ValueError
    for a file of another kind or for another model, for numbers that are not finite, and where several different sets
    of weights fit.
    """
    if path.is_dir():
        raise ValueError(f"{key}: {path} must be a file of weights; it is a folder: name the file in it")
    if not path.is_file():
        raise FileNotFoundError(f"{key}: there is no file {path}; train it first, or correct the path")
    where = f"{key}: {path}"
    content = read(path, named=where, otherwise="copy or download it again")
    option = "teacher.weights" if key.startswith("teacher.") else "student.weights"
    sets = _fitting(model, content, where)
    averages, raw = [one for one in sets if one.average], [one for one in sets if not one.average]
    if weights == "raw" and not raw:
        raise ValueError(f"{where} contains only averaged weights ({averages[0].place}); set {option}=average")
    chosen, others = (raw, averages) if weights == "raw" or not averages else (averages, raw)
    if any(not chosen[0].equals(another) for another in chosen[1:]):
        raise ValueError(
            f"{where} contains several sets of weights that fit ({', '.join(one.place for one in chosen)});"
            " load the file with torch.load, and save the right set alone with torch.save"
        )
    if others and announce and Ranks.current().first:
        kinds = ("average", "raw") if chosen is averages else ("raw", "average")
        print(
            f"lrds-fast: {where} contains raw and averaged weights: loaded the {kinds[0]} ({chosen[0].place});"
            f" {option}={kinds[1]} loads the other ({others[0].place})",
            file=sys.stderr,
        )
    broken = [entry.name for entry in chosen[0].entries.values() if not bool(entry.tensor.isfinite().all())]
    if broken:
        raise ValueError(
            f"{where} has NaN or infinite numbers in {_some(broken)}: its training diverged, or the file is damaged;"
            " take an earlier checkpoint"
        )
    chosen[0].fill(model)


def load_state(model: nn.Module, state: Any, where: str) -> None:
    """Loads `model` from a state dict. Raises a ValueError that begins with `where` and names the differences."""
    _fitting(model, state, where)[0].fill(model)


def read(path: Path, *, named: str, otherwise: str) -> Any:
    """The content of a file of torch.save or safetensors, on the CPU. Code in the file is not run.

    Raises a ValueError that begins with `named` and says what the file is, if it is of another kind. otherwise: the
    advice for a damaged file.
    """
    with path.open("rb") as file:
        head = file.read(1024)
    try:
        if _is_safetensors(head):
            from safetensors.torch import load_file

            return load_file(path)
        # Passed as an open file, because torch.load interprets the suffix of a path.
        with path.open("rb") as file, torch.serialization.safe_globals(_HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on plain pickles, which raise an error below
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged zip raises RuntimeError, EOFError, OSError or KeyError
        try:
            kind = _kind(path, head, error, otherwise)
        except Exception:  # the zip's directory is damaged
            kind = f"damaged; {otherwise}"
        raise ValueError(f"{named} is {kind}") from error


def safetensors_bytes(model: nn.Module, facts: Mapping[str, str]) -> bytes:
    """The model's weights as the content of a .safetensors file. facts: metadata, stored as JSON under the key
    lrds_fast."""
    from safetensors.torch import save

    # Clones: safetensors does not store tensors that share memory, as tied weights do.
    state = {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
    # One key: with several their order is not fixed, and equal weights would give unequal files.
    content: bytes = save(state, metadata={"lrds_fast": json.dumps(dict(facts))})
    return content


def safetensors_facts(path: Path) -> dict[str, str]:
    """The metadata that safetensors_bytes stored in a file; {} for other files."""
    with path.open("rb") as file:
        if not _is_safetensors(file.read(9)):
            return {}
    from safetensors import safe_open

    with safe_open(path, framework="pt") as weights:
        facts = json.loads((weights.metadata() or {}).get("lrds_fast", "{}"))
    return {str(key): str(value) for key, value in facts.items()}


@dataclass(eq=False)
class _Entry:
    """A tensor of the file. container: the name of its dict. name: its full name, which begins with container."""

    container: str
    name: str
    tensor: Tensor


@dataclass
class _Weights:
    """The tensors of a file whose names are the model's names behind a prefix. entries: by the model's names. missing:
    names that only the model has; surplus: names that only the file has. average: whether the weights are averaged."""

    prefix: str
    entries: dict[str, _Entry] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    surplus: list[str] = field(default_factory=list)
    average: bool = False

    @property
    def place(self) -> str:
        """The prefix, for messages."""
        return self.prefix.rstrip(".") or "its top level"

    def equals(self, other: _Weights) -> bool:
        """Whether both have the same names, dtypes and values."""
        if self.entries.keys() != other.entries.keys():
            return False
        pairs = [(entry.tensor, other.entries[name].tensor) for name, entry in self.entries.items()]
        return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)

    def misshapen(self, state: Mapping[str, Tensor]) -> list[str]:
        """Names of the tensors whose shape differs from that in the model's state."""
        return [name for name, entry in self.entries.items() if entry.tensor.shape != state[name].shape]

    def fill(self, model: nn.Module) -> None:
        """Loads the weights into the model."""
        names = {_plain(name): name for name in model.state_dict()}
        # Batch norms accept a state without their counters if it has no layout version, as a plain dict.
        model.load_state_dict({names[name]: entry.tensor for name, entry in self.entries.items()})


def _fitting(model: nn.Module, content: Any, where: str) -> list[_Weights]:
    """All sets of weights in `content` that fit the model; ValueError where there are none."""
    state = {_plain(name): value for name, value in model.state_dict().items()}
    entries = list(_tensors(content))
    if not entries:
        raise ValueError(f"{where} contains no state dict of tensors but {_outline(content)}")
    sets = _by_prefix(entries, state)
    complete = [weights for weights in sets if not weights.missing]
    claimed = {entry for weights in complete for entry in weights.entries.values()}
    candidates = complete or [max(sets, key=lambda weights: len(weights.entries))]
    for weights in candidates:
        _judge(weights, entries, claimed.union(weights.entries.values()))
    named = [weights for weights in complete if not weights.surplus]
    fitting = [weights for weights in named if not weights.misshapen(state)]
    if fitting:
        return fitting
    if named:
        raise ValueError(f"{where} is for another model: {_shapes(named[0], state)}")
    nearest = min(candidates, key=lambda weights: len(weights.surplus))
    differences = [f"lacks {_some(nearest.missing)}"] if nearest.missing else []
    differences += [f"has {_some(nearest.surplus)}, which the model does not have"] if nearest.surplus else []
    raise ValueError(
        f"{where} is for another model: it {' and '.join(differences)}; the file contains {_inventory(entries)};"
        " set the model that it was saved from"
    )


def _tensors(content: Any) -> Iterator[_Entry]:
    """Every tensor in nested dicts and lists. A dict that occurs twice is read once."""
    seen: set[int] = set()
    queue = deque([("", content)])
    while queue:
        container, value = queue.popleft()
        if not isinstance(value, (Mapping, list, tuple)) or id(value) in seen:
            continue
        seen.add(id(value))
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            if isinstance(item, Tensor):
                yield _Entry(container, _plain(f"{container}{key}"), item)
            else:
                queue.append((_plain(f"{container}{key}."), item))


def _by_prefix(entries: list[_Entry], state: Mapping[str, Tensor]) -> list[_Weights]:
    """One _Weights for every prefix that precedes a name of the model in the file. state: the model's."""
    sets: dict[str, _Weights] = {}
    for entry in entries:
        start = 0
        while start >= 0:
            name = entry.name[start:]
            if name in state:
                prefix = entry.name[:start]
                sets.setdefault(prefix, _Weights(prefix)).entries.setdefault(name, entry)
            start = entry.name.find(".", start) + 1 or -1
    if not sets:  # no common name: the error compares the model with the largest dict
        containers = [entry.container for entry in entries]
        largest = max(containers, key=containers.count)
        sets[largest] = _Weights(largest)
    for weights in sets.values():
        # PyTorch also loads files without these counters; only batch norms with momentum=None read them.
        weights.missing = [
            name for name in state if name not in weights.entries and name.rpartition(".")[2] != _COUNTER
        ]
    return list(sets.values())


def _judge(weights: _Weights, entries: list[_Entry], claimed: set[_Entry]) -> None:
    """Sets `average` and `surplus`. claimed: the entries of this and of other complete sets of weights."""
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


def _shapes(weights: _Weights, state: Mapping[str, Tensor]) -> str:
    """An error text with the first tensor of another shape and the likely reason."""
    names = weights.misshapen(state)
    shapes = [(tuple(weights.entries[name].tensor.shape), tuple(state[name].shape)) for name in names]
    in_file, in_model = shapes[0]
    text = f"{names[0]} has shape {in_file}, the model's has {in_model}"
    text += f", and {len(names) - 1} more differ" if len(names) > 1 else ""
    if in_file and in_model and all((a[:1], b[:1], a[1:]) == (in_file[:1], in_model[:1], b[1:]) for a, b in shapes):
        return (
            f"{text}; the class counts differ: the file has {in_file[0]} classes, the model {in_model[0]};"
            " use weights with the model's classes"
        )
    return f"{text}; the widths or the input sizes differ: set the model that it was saved from"


def _some(names: list[str], limit: int = 3) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(repr(name) for name in names[:limit]) + more


def _inventory(entries: list[_Entry]) -> str:
    """The largest dicts of tensors in the file, each with its first name, for an error."""
    groups: dict[str, list[_Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.container, []).append(entry)
    largest = sorted(groups.items(), key=lambda group: -len(group[1]))
    groups_text = [
        f"{len(members)} tensors in {container.rstrip('.') or 'its top level'} ({members[0].name[len(container) :]!r}"
        f"{', ...' if len(members) > 1 else ''})"
        for container, members in largest[:3]
    ]
    return ", ".join(groups_text) + (f" and {len(largest) - 3} more dicts" if len(largest) > 3 else "")


def _outline(content: Any) -> str:
    if isinstance(content, Mapping) and content:
        return f"a dict of {_some([str(key) for key in content], 8)}"
    return f"an object of type {type(content).__name__}"


def _is_safetensors(head: bytes) -> bool:
    """Whether the file begins with a header length of at most 100 MB and a JSON header."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= 100_000_000


def _kind(path: Path, head: bytes, error: Exception, otherwise: str) -> str:
    """An error text that says what an unreadable file is and what to do."""
    if not head:
        return f"empty (0 bytes); {otherwise}"
    if _is_safetensors(head):
        return f"a damaged or truncated safetensors file; {otherwise}"
    if head.startswith(b"version https://git-lfs"):
        return "a git-LFS pointer instead of the weights; fetch them: git lfs pull"
    if head.removeprefix(codecs.BOM_UTF8).lstrip().lower().startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        return "a web page (HTML or XML), not weights; download the file itself, by its raw or direct link"
    for magic, name in _FOREIGN.items():
        if head.startswith(magic):
            return name
    unsafe = re.search(r"GLOBAL (\S+)", str(error))
    if unsafe:
        what = "a whole pickled module" if _is_module(path) else "a pickled object"
        return (
            f"not a checkpoint of tensors alone: it holds {what}, which needs the code of {unsafe[1]}, and code in"
            f" a file is not run; {_SAVE_THE_STATE}"
        )
    if head.startswith(b"PK"):
        return _kind_of_zip(path, error, otherwise)
    if head.startswith(b"\x80") and not head.startswith(_PREFIX_OF_TORCH):
        return f"a plain pickle, not a file of torch.save; {_SAVE_THE_STATE}"
    text = _text(head)
    if text:
        return f"a text file, which begins {text.strip().splitlines()[0][:40]!r}, not weights; correct the path"
    return f"damaged, truncated, or neither a file of torch.save nor safetensors; {otherwise}"


def _kind_of_zip(path: Path, error: Exception, otherwise: str) -> str:
    if not zipfile.is_zipfile(path):
        return f"a truncated zip archive; {otherwise}"
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any(name.endswith("/constants.pkl") for name in names):
        return (
            "a TorchScript program, not a checkpoint of tensors alone; save its weights:"
            " torch.save(torch.jit.load(FILE).state_dict(), OTHER)"
        )
    if not any(name.endswith("/data.pkl") for name in names):
        return f"a zip archive of other files ({_some(names)}); unpack it and name the file of weights"
    if isinstance(error, pickle.UnpicklingError):
        return f"not a checkpoint of tensors alone, or damaged; {_SAVE_THE_STATE}"
    return f"damaged; {otherwise}"


def _is_module(path: Path) -> bool:
    """Whether the file is a pickled nn.Module: one contains the names of its attributes."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            pickles = [archive.read(name) for name in archive.namelist() if name.endswith("/data.pkl")]
    else:
        with path.open("rb") as file:
            pickles = [file.read(1 << 22)]
    return any(b"_modules" in content and b"_parameters" in content for content in pickles)


def _text(head: bytes) -> str:
    """The beginning of a text file; "" for other files."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return ""
    return text if text.strip() and all(letter.isprintable() or letter.isspace() for letter in text) else ""
