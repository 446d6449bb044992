"""Scores on disk: a folder of Parquet files, one per shard of the data, that a killed process leaves usable.

    part-00000012.parquet       index, label, teacher_pred and every score of a run of batches, whole or absent
    _plan.json                  what the scores depend on; a run with other facts is refused
    _complete.json              written last: number of samples, the scores' meta
    _*.safetensors              what resuming needs (factors, direction, rows of the last layer); deleted at the end

pandas, polars, duckdb and pyarrow read the folder as one dataset: names that start with _ are not theirs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
#: Batches that make up a shard, at most.
SHARD_BATCHES = 64
_KEY = b"lrds_fast.scores"
_FIXED = ("index", "label", "teacher_pred")


class OnDisk:
    """A tensor of a safetensors file, read slice by slice and never mapped as a whole."""

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
        """The tensor, where it has no dimensions."""
        with self._open() as file:
            tensor: Tensor = file.get_tensor(self._key)
            return tensor.clone()


class Shards:
    """Where the shards of a run go: a folder, or memory where `path` is None.

    A shard is a run of `batches` consecutive batches; process r of `ranks` has those whose number is r modulo their
    count. All processes must see the same folder.
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
        # So small that every process has several, where the number of batches is known.
        self.batches = SHARD_BATCHES if batches is None else max(1, min(SHARD_BATCHES, batches // (4 * ranks.count)))
        self._memory: dict[int, dict[str, Tensor]] = {}
        self._plan = json.dumps(dict(facts), sort_keys=True)
        problem = ""
        if self.folder is None:
            if resume:
                raise ValueError("resume=True needs out=, the folder of the run to go on with")
        elif ranks.first:
            try:
                self.batches = self._opened(self.folder, resume)
            except (OSError, ValueError) as error:
                problem = str(error)
        problem, self.batches = ranks.agree((problem, self.batches))
        if problem:
            raise ValueError(problem)

    def _opened(self, folder: Path, resume: bool) -> int:
        """Makes or checks the folder; the shards' size in it."""
        plan = folder / "_plan.json"
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"out={folder} is a file; name a folder")
        if plan.exists():
            if not resume:
                raise ValueError(f"out={folder} holds scores already: resume=True goes on with them; or name another")
            found = _json(plan)
            if found.get("format") != FORMAT:
                raise ValueError(f"{plan} has format {found.get('format')!r}; this version writes {FORMAT}")
            wanted = json.loads(self._plan)
            for name in sorted(wanted | found["facts"]):
                if wanted.get(name) != found["facts"].get(name):
                    was, now = found["facts"].get(name), wanted.get(name)
                    raise ValueError(f"out={folder} was begun with {name} = {was}, not {now}; name another folder")
            remove_partial(folder)
            return int(found["shard_batches"])
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"out={folder} is not empty and holds no scores; name a new folder")
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(plan) as temporary:
            text = json.dumps({"format": FORMAT, "shard_batches": self.batches, "facts": json.loads(self._plan)})
            Path(temporary).write_text(text, encoding="utf-8")
        return self.batches

    @property
    def complete(self) -> bool:
        """Whether an earlier run has finished."""
        return self.folder is not None and bool(self.ranks.agree((self.folder / "_complete.json").exists()))

    def of(self, batch: int) -> int:
        """The shard of a batch."""
        return batch // self.batches

    def ends_with(self, batch: int) -> bool:
        """Whether no batch of the shard comes after this one."""
        return (batch + 1) % self.batches == 0

    def mine(self, shard: int) -> bool:
        """Whether it is this process's."""
        return shard % self.ranks.count == self.ranks.rank

    def done(self, shard: int) -> bool:
        """Whether its scores are there."""
        return shard in self._memory if self.folder is None else self._part(shard).exists()

    def _part(self, shard: int) -> Path:
        assert self.folder is not None
        return self.folder / f"part-{shard:08d}.parquet"

    def write(self, shard: int, start: int, columns: Mapping[str, Tensor]) -> None:
        """A shard's columns (n,), label and teacher_pred among them; start: its first sample.

        Raises ValueError naming the first sample of which a score is not finite.
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
        """How many samples all processes' shards hold."""
        if self.folder is None:
            own = sum(len(columns["index"]) for columns in self._memory.values())
            return sum(self.ranks.gather(own))
        self.ranks.wait()
        return sum(pq.read_metadata(file).num_rows for file in self.folder.glob("*.parquet"))

    def keep(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Tensors that resuming needs, in `_name.safetensors`."""
        assert self.folder is not None
        with replacing(self.folder / f"_{name}.safetensors") as temporary:
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary)

    def kept(self, name: str) -> dict[str, Tensor] | None:
        """What keep has written; None where it has not."""
        path = self.kept_path(name)
        if path is None or not path.exists():
            return None
        try:
            # Copies, at an address as aligned as any other tensor's: products round by alignment.
            return {key: tensor.clone() for key, tensor in load_file(path).items()}
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); delete it and resume") from error

    def kept_shards(self, name: str) -> list[int]:
        """The numbers of the shards that something has been kept of as `name-number`."""
        if self.folder is None:
            return []
        return sorted(int(path.stem.rpartition("-")[2]) for path in self.folder.glob(f"_{name}-*.safetensors"))

    def kept_path(self, name: str) -> Path | None:
        """The file of keep(name)."""
        return None if self.folder is None else self.folder / f"_{name}.safetensors"

    def finish(self, meta: Mapping[str, object]) -> Scores:
        """All processes' shards as one; every process gets them."""
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
    """The scores of a folder that influence.score(out=...) has written.

    Raises FileNotFoundError where there is none, ValueError naming the file for a run that is not complete, for parts
    that are missing, damaged, repeated or of another run.
    """
    folder = Path(path)
    if not (folder / "_plan.json").is_file():
        raise FileNotFoundError(f"{folder} holds no scores; influence.score(..., out=...) writes them")
    if not (folder / "_complete.json").is_file():
        raise ValueError(f"the scores in {folder} are not complete; run influence.score again with resume=True")
    plan = json.dumps(_json(folder / "_plan.json")["facts"], sort_keys=True)
    meta = _json(folder / "_complete.json")["meta"]
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
            raise ValueError(f"{file} belongs to another run than {folder / '_plan.json'}; take it away and resume")
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


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); delete the folder and score again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged; delete the folder and score again")
    return found
