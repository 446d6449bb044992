"""Pictures decoded by NVIDIA DALI, on the CPU or the GPU, in the trainer's order.

DALI decodes; on a GPU it also resizes and normalises. The order of the samples, their crops and their mirroring are
drawn here, per sample, seed and epoch. So an epoch has every sample once, processes divide it without duplicates, a run
can resume within it, and DALI, torchvision and any number of threads give the same pictures. On the CPU PyTorch's
integer resampling replaces DALI's: 0.17 ms per photograph against 0.7.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lrds_fast.data.boxes import Box, centre_box, crop_seed, geometry, random_box
from lrds_fast.data.loader import Batch, batch_count, check_sizes, epoch_batches, view_of
from lrds_fast.data.pictures import Unreadable, decoded, for_dali, reading
from lrds_fast.data.sources import Source
from lrds_fast.data.strong import PLAIN, Strong
from lrds_fast.data.transform import MEAN, STD
from lrds_fast.recipe.recipe import DataOptions

#: Batches that are read and decoded in advance.
DEPTH = 2


class _Sample(NamedTuple):
    """A sample for the pipeline: the file's bytes and the box to cut out. error: why it cannot be read, or None. seed:
    of its strong augmentation."""

    data: np.ndarray
    box: Box
    error: str | None
    seed: int = 0


class DaliLoader:
    """A Loader over some rows of a Source; see Loader for its methods.

    source: the pictures. rows: (size,) int64, the split's samples in it. train=True: RandomResizedCrop(image_size) and
    RandomHorizontalFlip; else Resize(image_size / 0.875) and CenterCrop(image_size). Bilinear with antialiasing.
    Batches are float32 (N, 3, image_size, image_size), normalised by ImageNet's mean and standard deviation.
    strong: further augmentation by torchvision, on the CPU in the threads, on a GPU after DALI.
    device: "cpu" or a CUDA device, which decodes JPEG files and holds the batches. threads: that decode on the CPU.
    least: a last batch of fewer samples is added to the one before it. views: 0 draws new augmentations in every epoch;
    n > 0 gives epoch e the augmentations of epoch e % n, in a new order.
    A picture that cannot be read or decoded is replaced by a grey one; `errors` lists (index, name, reason) of each.
    ImportError without DALI, ValueError for sizes below 1.
    """

    def __init__(
        self,
        source: Source,
        rows: Tensor,
        *,
        batch_size: int,
        image_size: int = 224,
        seed: int = 0,
        shuffle: bool = False,
        train: bool = False,
        strong: Strong = PLAIN,
        device: torch.device | str = "cpu",
        threads: int = 1,
        least: int = 2,
        views: int = 0,
    ) -> None:
        if threads < 1 or image_size < 1:
            raise ValueError(f"threads and image_size must be at least 1; got {threads} and {image_size}")
        check_sizes(batch_size, least, views)
        self.num_classes = len(source.classes)
        self.labels = source.labels[rows]
        self.batch_size, self.image_size, self.seed = batch_size, image_size, seed
        self.shuffle, self.train, self.threads = shuffle, train, threads
        self.least, self.views = least, views
        self.device, self.strong = torch.device(device), strong
        self.errors: list[tuple[int, str, str]] = []
        self._source, self._rows = source, rows
        self._wrong: set[int] = set()
        self._pipeline: Any = None
        self._capacity = 0
        self._feed = _Feed(iter(()))
        self._pool: ThreadPoolExecutor | None = None
        _dali()

    @classmethod
    def of(
        cls,
        options: DataOptions,
        source: Source,
        rows: Tensor,
        *,
        train: bool = False,
        device: torch.device | str | None = None,
        **arguments: Any,
    ) -> DaliLoader:
        """The loader that a recipe's [data] describes. train: shuffled and augmented, in batches of batch_size; else in
        order, as they are, in batches of eval_batch_size. arguments: of DaliLoader."""
        if train:
            arguments |= {"batch_size": options.batch_size, "shuffle": True, "train": options.augment == "crop-flip"}
        else:
            arguments |= {"batch_size": options.eval_batch_size}
        return cls(
            source,
            rows,
            image_size=options.image_size,
            device=device or "cpu",
            threads=options.workers or 1,
            **arguments,
        )

    def __len__(self) -> int:
        return batch_count(len(self.labels), self.batch_size, self.least)

    def epoch(
        self, epoch: int, selected: Tensor | None = None, *, start: int = 0, share: tuple[int, int] = (0, 1)
    ) -> Iterator[Batch]:
        view = view_of(epoch, self.views)
        batches = epoch_batches(
            len(self.labels),
            self.batch_size,
            seed=self.seed,
            epoch=epoch,
            shuffle=self.shuffle,
            selected=selected,
            least=self.least,
            start=start,
            share=share,
        )
        # A process may have no row of the last batch, and the pipeline takes no empty batch.
        empty = batches.pop() if batches and not len(batches[-1]) else None
        capacity = max(-(-(self.batch_size + self.least - 1) // share[1]), max(map(len, batches), default=0))
        if capacity > self._capacity:
            self._pipeline, self._capacity = None, capacity
        finished = False
        with ThreadPoolExecutor(self.threads) as pool:
            self._pool = pool
            try:
                self._feed = _Feed(self._read_ahead(pool, batches, view))
                yield from self._decoded_batches()
                if empty is not None:
                    images = torch.empty(0, 3, self.image_size, self.image_size, device=self.device)
                    yield Batch(images, self.labels[empty].to(images.device), empty)
                finished = True
            finally:
                pool.shutdown(cancel_futures=True)
                if finished and self._pipeline is not None:
                    self._pipeline.reset()
                else:  # the epoch was left in the middle: the pipeline holds batches that belong to no other epoch
                    self._pipeline = None

    def _decoded_batches(self) -> Iterator[Batch]:
        """The feed's batches, decoded."""
        while True:
            try:
                decoded = self._decode()
            except StopIteration:
                return
            except (MemoryError, ImportError):
                raise
            except Exception as error:
                # A broken pipeline loses the batches behind this one too: they run again.
                self._repair(error)
                continue
            # The caller may be in inference mode, whose tensors the threads could not write to.
            with torch.inference_mode(False):
                images = self._finish(decoded)
            index, _ = self._feed.in_pipeline.popleft()
            yield Batch(images, self.labels[index].to(images.device), index)

    def _read_ahead(
        self, pool: ThreadPoolExecutor, batches: Sequence[Tensor], view: int
    ) -> Iterator[tuple[Tensor, list[_Sample]]]:
        """Batches as the pool has read them. While one is used, the DEPTH next ones are read."""
        submitted: deque[tuple[Tensor, list[Future[_Sample]]]] = deque()
        for index in [*batches, *[None] * DEPTH]:
            if index is not None:
                submitted.append((index, [pool.submit(self._prepare, i, view) for i in index.tolist()]))
            if submitted and (index is None or len(submitted) > DEPTH):
                first, futures = submitted.popleft()
                samples = [future.result() for future in futures]
                self._note(first, samples)
                yield first, samples

    def boxes(self, epoch: int, indices: Tensor) -> Tensor:
        """See Loader.boxes; reads the files' headers. Without train, a box is the whole picture; an unreadable picture
        has zeros."""
        view = view_of(epoch, self.views)
        seeds = [crop_seed(self.seed, view, i, self.strong.stream) for i in indices.tolist()]
        return geometry(self._source, self._rows[indices], seeds if self.train else None, self.image_size)

    def picture(self, index: int) -> Tensor:
        try:
            with reading():
                small = decoded(self._source.read(int(self._rows[index])), about=96)
        except Unreadable:
            return torch.full((96, 96, 3), 128, dtype=torch.uint8)
        return torch.from_numpy(np.array(small))

    def _prepare(self, index: int, view: int) -> _Sample:
        """Reads a sample and draws its box; runs in a thread."""
        if index in self._wrong:
            return self._grey("known to be unreadable")
        try:
            with reading():
                data, height, width = for_dali(self._source.read(int(self._rows[index])))
        except Unreadable as error:
            return self._grey(str(error))
        if self.train:
            box = random_box(height, width, self.image_size, crop_seed(self.seed, view, index, self.strong.stream))
            return _Sample(data, box, None, self.strong.seed(self.seed, view, index))
        return _Sample(data, centre_box(height, width, self.image_size), None)

    def _grey(self, reason: str) -> _Sample:
        """The grey picture that replaces an unreadable one."""
        size = self.image_size
        return _Sample(_GREY, Box(0, 0, 1, 1, size, size, 0, 0, False), reason)

    def _note(self, index: Tensor, prepared: Sequence[_Sample]) -> None:
        for i, sample in zip(index.tolist(), prepared, strict=True):
            if sample.error is not None:
                self._note_one(i, sample.error)

    def _note_one(self, index: int, reason: str) -> None:
        if index not in self._wrong:
            self._wrong.add(index)
            self.errors.append((index, self._source.name(int(self._rows[index])), reason))

    def _decode(self) -> Any:
        """DALI's list of the next batch's pictures. Raises StopIteration after the last batch, and another exception if
        a picture cannot be decoded."""
        on_gpu = self.device.type == "cuda"
        if self._pipeline is None:
            build = _gpu_pipeline if on_gpu else _cpu_pipeline
            # A weak reference: in a reference cycle the garbage collector would end the pipeline, maybe in a forked
            # process, where its threads do not exist.
            reference = weakref.ref(self)

            def inputs() -> tuple[list[np.ndarray], ...]:
                loader = reference()
                assert loader is not None
                return loader._next()

            options = {"normalise": not self.strong.moves_pixels} if on_gpu else {}
            self._pipeline = build(inputs, self._capacity, self.image_size, self.device, self.threads, **options)
        (images,) = self._pipeline.run()
        return images

    def _finish(self, images: Any) -> Tensor:
        """The network's input for the oldest batch in the pipeline. images: DALI's list of its decoded pictures."""
        _, prepared = self._feed.in_pipeline[0]
        seeds = [sample.seed for sample in prepared]
        if self.device.type == "cuda":
            plugin: Any = importlib.import_module("nvidia.dali.plugin.pytorch")
            dense = images.as_tensor()
            kind = torch.uint8 if self.strong.moves_pixels else torch.float32
            batch = torch.empty(dense.shape(), dtype=kind, device=self.device)
            plugin.feed_ndarray(dense, batch, cuda_stream=torch.cuda.current_stream(self.device))
            if self.strong.moves_pixels:
                batch = _normalised(self.strong.augment(batch, seeds))
            return self.strong.erase(batch, seeds)
        pixels = torch.empty(len(prepared), 3, self.image_size, self.image_size, dtype=torch.uint8)

        def resample(place: int) -> None:
            decoded = torch.from_numpy(images.at(place)).permute(2, 0, 1)[None]
            cut = _resampled(decoded, prepared[place].box, self.image_size)
            pixels[place] = self.strong.augment(cut, seeds[place : place + 1])[0]

        assert self._pool is not None
        list(self._pool.map(resample, range(len(prepared))))
        return self.strong.erase(_normalised(pixels), seeds)

    def _next(self) -> tuple[list[np.ndarray], ...]:
        """The pipeline's inputs of a batch: data, start, shape, and on a GPU begin, end, mirror."""
        _, prepared = next(self._feed)
        boxes = [sample.box for sample in prepared]
        inputs = (
            [sample.data for sample in prepared],
            [np.array((box.top, box.left), dtype=np.int32) for box in boxes],
            [np.array((box.height, box.width), dtype=np.int32) for box in boxes],
        )
        if self.device.type != "cuda":
            return inputs
        # The region that remains after resizing, in pixels before resizing.
        scales = [np.array((box.height / box.resized_height, box.width / box.resized_width)) for box in boxes]
        begins = [np.array((box.down, box.right)) for box in boxes]
        return (
            *inputs,
            [(begin * scale).astype(np.float32) for begin, scale in zip(begins, scales, strict=True)],
            [
                ((begin + self.image_size) * scale).astype(np.float32)
                for begin, scale in zip(begins, scales, strict=True)
            ],
            [np.array(box.mirrored, dtype=np.int32) for box in boxes],
        )

    def _repair(self, error: Exception) -> None:
        """Decodes the samples in the pipeline one by one, replaces those that fail by grey pictures, and returns the
        batches to the feed. RuntimeError if all can be decoded: another try would fail in the same way."""
        feed = self._feed
        repaired, new_faults = [], 0
        for index, prepared in feed.in_pipeline:
            sound = list(prepared)
            for place, (i, sample) in enumerate(zip(index.tolist(), prepared, strict=True)):
                reason = sample.error or self._fault(sample)
                if reason is not None:
                    new_faults += sample.error is None
                    self._note_one(i, reason)
                    sound[place] = self._grey(reason)
            repaired.append((index, sound))
        self._feed = _Feed(itertools.chain(repaired, feed._batches))
        self._pipeline = None
        if not new_faults:
            if not isinstance(error, RuntimeError):
                raise error
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise RuntimeError(
                f"DALI fails on a batch, although it decodes each of its pictures alone: {reason}"
            ) from error

    def _fault(self, sample: _Sample) -> str | None:
        """Why DALI cannot decode a sample; None if it can."""
        outer, self._feed, self._pipeline = self._feed, _Feed(iter([(torch.zeros(1), [sample])])), None
        try:
            self._decode()
        except MemoryError:
            raise
        except Exception:
            return "damaged, cut short, or of a kind that DALI does not decode"
        finally:
            self._feed, self._pipeline = outer, None
        return None


class _Feed:
    """Batches on their way into the pipeline. in_pipeline: those that it has taken and not yet returned."""

    def __init__(self, batches: Iterator[tuple[Tensor, list[_Sample]]]) -> None:
        self._batches = batches
        self.in_pipeline: deque[tuple[Tensor, list[_Sample]]] = deque()

    def __iter__(self) -> Iterator[tuple[Tensor, list[_Sample]]]:
        return self

    def __next__(self) -> tuple[Tensor, list[_Sample]]:
        batch = next(self._batches)
        self.in_pipeline.append(batch)
        return batch


def has_dali() -> bool:
    """Whether DALI is installed."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:
        return False


def _dali() -> Any:
    try:
        from nvidia import dali
    except ImportError as error:
        raise ImportError(
            f"data.reader=dali needs DALI: pip install nvidia-dali-cuda130, or set data.reader=torchvision ({error})"
        ) from error
    return dali


def _resampled(decoded: Tensor, box: Box, size: int) -> Tensor:
    """(1, 3, size, size) uint8 of the decoded pixels (1, 3, height, width), as Pillow resamples them."""
    target = (box.resized_height, box.resized_width)
    if decoded.shape[2:] != target:
        decoded = F.interpolate(decoded, target, mode="bilinear", antialias=True)
    cut = decoded[:, :, box.down : box.down + size, box.right : box.right + size]
    return cut.flip(3) if box.mirrored else cut


def _normalised(pixels: Tensor) -> Tensor:
    """float32 of (N, 3, H, W) uint8."""
    centre, spread = _CENTRE.to(pixels.device), _SPREAD.to(pixels.device)
    return pixels.float().mul_(1.0 / spread).sub_(centre / spread)


_Inputs = Callable[[], tuple[list[np.ndarray], ...]]


def _decoded(inputs: _Inputs, names: int, device: torch.device) -> Any:
    """Within a pipeline's definition: the decoded boxes, and the other inputs."""
    dali = _dali()
    fn, types = dali.fn, dali.types
    kinds = [types.UINT8, types.INT32, types.INT32, types.FLOAT, types.FLOAT, types.INT32]
    data, start, shape, *more = fn.external_source(
        source=inputs, num_outputs=names, batch=True, ndim=[1, 1, 1, 1, 1, 0][:names], dtype=kinds[:names]
    )
    # Raises an exception for a header that cannot be parsed; the decoder may crash the process there.
    parsed = fn.peek_image_shape(data, dtype=types.INT32)
    pictures = fn.decoders.image_slice(
        data,
        start=start,
        shape=shape + 0 * parsed[:2],
        axes=[0, 1],
        device="mixed" if device.type == "cuda" else "cpu",
        output_type=types.RGB,
        # Published models are trained on pictures without EXIF rotation, as torchvision reads them.
        adjust_orientation=False,
    )
    return pictures, more


def _cpu_pipeline(inputs: _Inputs, batch_size: int, _: int, device: torch.device, threads: int) -> Any:
    """Decoding alone."""
    pipeline = _dali().Pipeline(batch_size=batch_size, num_threads=threads, device_id=None, prefetch_queue_depth=DEPTH)
    with pipeline:
        pipeline.set_outputs(_decoded(inputs, 3, device)[0])
    pipeline.build()
    return pipeline


def _gpu_pipeline(
    inputs: _Inputs, batch_size: int, image_size: int, device: torch.device, threads: int, *, normalise: bool = True
) -> Any:
    """decode -> resize -> normalise; without normalise, uint8."""
    dali = _dali()
    fn, types = dali.fn, dali.types
    pipeline = dali.Pipeline(
        batch_size=batch_size, num_threads=threads, device_id=device.index or 0, prefetch_queue_depth=DEPTH
    )
    with pipeline:
        pictures, (begin, end, mirror) = _decoded(inputs, 6, device)
        pictures = fn.resize(
            pictures,
            size=(image_size, image_size),
            roi_start=begin,
            roi_end=end,
            interp_type=types.INTERP_LINEAR,
            antialias=True,
        )
        pictures = fn.crop_mirror_normalize(
            pictures,
            mirror=mirror,
            mean=[255.0 * value for value in MEAN] if normalise else [0.0],
            std=[255.0 * value for value in STD] if normalise else [1.0],
            dtype=types.FLOAT if normalise else types.UINT8,
            output_layout="CHW",
        )
        pipeline.set_outputs(pictures)
    pipeline.build()
    return pipeline


_CENTRE = torch.tensor(MEAN).view(3, 1, 1) * 255.0
_SPREAD = torch.tensor(STD).view(3, 1, 1) * 255.0

# A PNG file of one grey pixel, in place of an unreadable picture.
_GREY = np.frombuffer(
    bytes.fromhex(
        "89504e470d0a1a0a0000000d4948445200000001000000010800000000"
        "3a7e9b550000000a49444154789c636800000082008177cd72b60000000049454e44ae426082"
    ),
    dtype=np.uint8,
)
