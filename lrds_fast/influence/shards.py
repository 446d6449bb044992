"""Scores on disk: a folder of Parquet files, one per shard of the data, that stays readable if a process is killed.

    part-00000012.parquet       index, label, teacher_pred and every score of a run of batches; complete or absent
    _plan.json                  what the scores depend on; resuming with other facts is an error
    _complete.json              written last: number of samples, the scores' meta
    _*.safetensors              what resuming needs (factors, directions, rows of the last layer); deleted at the end

pandas, polars, duckdb and pyarrow read the folder as one dataset: they skip names that start with _.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lrds_fast.files import remove_partial, replacing
from lrds_fast.influence.inputs import check_scores
from lrds_fast.influence.scores import Scores, split_errors
from lrds_fast.ranks import Ranks

FORMAT = 1
#: The most batches in a shard.
SHARD_BATCHES = 64
_KEY = b"lrds_fast.scores"
_FIXED = ("index", "label", "teacher_pred")
_Made = TypeVar("_Made")


class OnDisk:
    """A tensor in a safetensors file that is read slice by slice and never mapped as a whole."""

    def __init__(self, path: Path, key: str) -> None:
        self._path, self._key = path, key
        with self._open() as file:
            self._rows = (file.get_slice(key).get_shape() or [1])[0]

    def _open(self) -> Any:
        try:
            return safe_open(self._path, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{self._path} is damaged ({error}); delete it and resume") from error

    def __len__(self) -> int:
        return int(self._rows)

    def __getitem__(self, rows: slice) -> Tensor:
        with self._open() as file:
            part: Tensor = file.get_slice(self._key)[rows]
            return part.clone()

    def scalar(self) -> Tensor:
        """The whole tensor, for one without dimensions."""
        with self._open() as file:
            tensor: Tensor = file.get_tensor(self._key)
            return tensor.clone()


class Shards:
    """The shards of a scoring run: files in a folder that all processes see, or memory where `path` is None.

    A shard is a number of consecutive batches (`self.batches`). Shard s belongs to the process whose rank is s modulo
    ranks.count. facts: what the scores depend on, JSON-ready; a folder with other facts is refused. resume: go on with
    the run in the folder. batches: the number of batches of the data, None where it is not known. Raises ValueError for
    a folder that does not fit.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        facts: Mapping[str, Any],
        *,
        resume: bool,
        batches: int | None,
        ranks: Ranks,
    ) -> None:
        self.ranks = ranks
        self.folder = None if path is None else Path(path)
        # Small enough that every process has several shards, where the number of batches is known.
        self.batches = SHARD_BATCHES if batches is None else max(1, min(SHARD_BATCHES, batches // (4 * ranks.count)))
        self._memory: dict[int, dict[str, Tensor]] = {}
        self._plan = json.dumps(dict(facts), sort_keys=True)
        problem = ""
        if self.folder is None:
            if resume:
                raise ValueError("resume=True needs out=, the folder of the run to resume")
        elif ranks.first:
            try:
                self.batches = self._open(self.folder, resume)
            except (OSError, ValueError) as error:
                problem = str(error)
        problem, self.batches = ranks.agree((problem, self.batches))
        if problem:
            raise ValueError(problem)

    def _open(self, folder: Path, resume: bool) -> int:
        """Creates the folder, or checks the one of an earlier run; returns the number of batches per shard in it."""
        plan = folder / "_plan.json"
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"out={folder} is a file; name a folder")
        if plan.exists():
            if not resume:
                raise ValueError(
                    f"out={folder} holds scores already: continue them with resume=True, or name another folder"
                )
            earlier = _read_json(plan)
            if earlier.get("format") != FORMAT:
                raise ValueError(f"{plan} has format {earlier.get('format')!r}; this version writes {FORMAT}")
            facts = json.loads(self._plan)
            for name in sorted(facts | earlier["facts"]):
                if facts.get(name) != earlier["facts"].get(name):
                    was, now = earlier["facts"].get(name), facts.get(name)
                    raise ValueError(f"out={folder} was started with {name} = {was}, not {now}; name another folder")
            remove_partial(folder)
            return int(earlier["shard_batches"])
        remove_partial(folder)  # a killed process may have left no more than this
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"out={folder} is not empty and holds no scores; name a new folder")
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(plan) as temporary:
            text = json.dumps({"format": FORMAT, "shard_batches": self.batches, "facts": json.loads(self._plan)})
            Path(temporary).write_text(text, encoding="utf-8")
        return self.batches

    @property
    def complete(self) -> bool:
        """Whether an earlier run has finished all shards."""
        return self.folder is not None and bool(self.ranks.agree((self.folder / "_complete.json").exists()))

    def of(self, batch: int) -> int:
        """The number of the shard that a batch belongs to."""
        return batch // self.batches

    def ends_with(self, batch: int) -> bool:
        """Whether the batch is the last one of a full shard."""
        return (batch + 1) % self.batches == 0

    def mine(self, shard: int) -> bool:
        """Whether the shard belongs to this process."""
        return shard % self.ranks.count == self.ranks.rank

    def done(self, shard: int) -> bool:
        """Whether the shard's scores have been written."""
        return shard in self._memory if self.folder is None else self._part(shard).exists()

    def _part(self, shard: int) -> Path:
        assert self.folder is not None
        return self.folder / f"part-{shard:08d}.parquet"

    def write(self, shard: int, start: int, columns: Mapping[str, Tensor]) -> None:
        """Writes a shard's columns (n,): label, teacher_pred and the scores. start: the number of its first sample.

        Raises ValueError naming the first sample whose score is not finite.
        """
        for name, column in columns.items():
            check_scores(name, column, start)
        columns = {name: column.cpu() for name, column in columns.items()}
        index = torch.arange(start, start + len(columns["label"]))
        if self.folder is None:
            self._memory[shard] = {"index": index, **columns}
            return
        arrays = {"index": index.numpy(), **{name: column.numpy() for name, column in columns.items()}}
        table = pa.table(arrays).replace_schema_metadata({_KEY: self._plan})
        with replacing(self._part(shard)) as temporary:
            pq.write_table(table, temporary, write_page_checksum=True)

    def written(self) -> int:
        """The number of samples in the shards of all processes."""
        if self.folder is None:
            samples = sum(len(columns["index"]) for columns in self._memory.values())
            return sum(self.ranks.gather(samples))
        self.ranks.wait()
        return sum(pq.read_metadata(file).num_rows for file in self.folder.glob("*.parquet"))

    def keep(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Writes tensors that resuming needs to `_name.safetensors`."""
        path = self.kept_path(name)
        assert path is not None
        _save_tensors(tensors, path)

    def once(
        self,
        name: str,
        make: Callable[[], _Made],
        save: Callable[[_Made, Path], None],
        load: Callable[[Path], _Made],
    ) -> _Made:
        """What `make` returns, or what an earlier run has kept of it as `name`; all processes make this call.

        The first process saves it, where there is a folder.
        """
        path = self.kept_path(name)
        if path is not None and self.ranks.agree(path.exists()):
            return load(path)
        made = make()
        if path is not None:
            if self.ranks.first:
                save(made, path)
            self.ranks.wait()
        return made

    def tensors_once(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """`once` for tensors by name."""
        return self.once(name, make, _save_tensors, _load_tensors)

    def kept_shards(self, name: str) -> list[int]:
        """The numbers of the shards for which `keep` has written `name-number`."""
        if self.folder is None:
            return []
        return sorted(int(path.stem.rpartition("-")[2]) for path in self.folder.glob(f"_{name}-*.safetensors"))

    def kept_path(self, name: str) -> Path | None:
        """The file of keep(name); None without a folder."""
        return None if self.folder is None else self.folder / f"_{name}.safetensors"

    def finish(self, meta: Mapping[str, object]) -> Scores:
        """The scores of all processes' shards, in every process. Marks a folder as complete."""
        if self.folder is not None:
            self.ranks.wait()
            if self.ranks.first and not (self.folder / "_complete.json").exists():
                with replacing(self.folder / "_complete.json") as temporary:
                    Path(temporary).write_text(json.dumps({"format": FORMAT, "meta": dict(meta)}), encoding="utf-8")
                for path in self.folder.glob("_*.safetensors"):
                    path.unlink()
            self.ranks.wait()
            return load_scores(self.folder)
        shards: dict[int, dict[str, Tensor]] = {}
        for part in self.ranks.gather(self._memory):
            shards |= part
        return _joined([shards[number] for number in sorted(shards)], meta)


def load_scores(path: str | os.PathLike[str]) -> Scores:
    """Reads the scores from a folder that influence.score(out=...) has written; on the CPU.

    Raises FileNotFoundError without such a folder, ValueError naming the file for a run that is not complete and for
    parts that are missing, damaged, repeated or of another run.
    """
    folder = Path(path)
    if not (folder / "_plan.json").is_file():
        raise FileNotFoundError(f"{folder} holds no scores; influence.score(..., out=...) writes them")
    if not (folder / "_complete.json").is_file():
        raise ValueError(f"the scores in {folder} are not complete; run influence.score again with resume=True")
    plan = json.dumps(_read_json(folder / "_plan.json")["facts"], sort_keys=True)
    meta = _read_json(folder / "_complete.json")["meta"]
    parts = []
    expected = 0
    for file in sorted(folder.glob("*.parquet")):
        try:
            table = pq.read_table(file, use_threads=False, page_checksum_verification=True)
        except (pa.ArrowException, OSError) as error:
            line = str(error).splitlines()[0]
            raise ValueError(
                f"{file} is truncated or damaged ({line}); delete it and _complete.json, and resume"
            ) from error
        raw = (table.schema.metadata or {}).get(_KEY)
        if raw is None or raw.decode() != plan:
            raise ValueError(f"{file} belongs to another run than {folder / '_plan.json'}; delete it and resume")
        part = {name: torch.tensor(table[name].to_numpy()) for name in table.column_names}
        index = part["index"]
        if not torch.equal(index, torch.arange(expected, expected + len(index))):
            first = int(index[0]) if len(index) else "nothing"
            raise ValueError(
                f"{file} begins at sample {first}, where {expected} is next: a part before it is missing or repeated;"
                " delete _complete.json and resume"
            )
        expected += len(index)
        parts.append(part)
    if expected != meta["num_samples"]:
        raise ValueError(
            f"{folder} has {expected} of {meta['num_samples']} samples: a part is missing; delete _complete.json and"
            " resume"
        )
    return _joined(parts, meta)


def _joined(parts: list[dict[str, Tensor]], meta: Mapping[str, object]) -> Scores:
    columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    scores, errors = split_errors({name: column for name, column in columns.items() if name not in _FIXED})
    return Scores(
        scores, target=columns["label"], teacher_pred=columns["teacher_pred"], meta=meta, standard_error=errors
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); delete the folder and score again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged; delete the folder and score again")
    return content


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    with replacing(path) as temporary:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary)


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        # Copies are aligned as every tensor is; results of products depend on the alignment.
        return {key: tensor.clone() for key, tensor in load_file(path).items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and resume") from error
