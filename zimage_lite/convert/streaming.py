"""The streaming converter: reads some rows, quantizes them, writes them where they belong.

A row chunk is independent of all others, so a few threads each carry chunks from the source file to the output file,
and peak memory is that of the chunks in flight, whatever the size of the tensors. Formats with a scale or a packing
that spans the tensor take it as one chunk, and fewer are in flight.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

import torch
from torch import Tensor

from ..calibration.known import Calibration
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.stored import FLOATS, StoredTensor
from ..checkpoint.writer import TensorWriter, open_writer
from ..errors import UserError
from ..quant.formats import Parts
from ..quant.tensor import TORCH_DTYPES, QTensor
from .fidelity import Sums, TensorError, sums
from .output_file import OutputFile, OutTensor, lay_out, metadata, output_tensors
from .recipe import Target
from .repair import Repair, RepairWriter, open_repair

CHUNK_WEIGHTS = 2**22  # smaller ones cost more in system calls and in waiting for Python's lock
IN_FLIGHT_WEIGHTS = 100_000_000  # two of the largest tensors, in float32 and packed: 0.6 GB
READ_AHEAD_BYTES = 2**26
SAFE_WEIGHT = 60_000  # up to here no float16, be it a weight or a scale, overflows

OnBytes = Callable[[int], None]  # source bytes just converted


class Files(Protocol):
    """Brings source files when they are needed, as hub.HubFiles does."""

    def fetch(self, path: Path) -> None: ...

    def release(self, path: Path) -> None: ...


@dataclass(frozen=True)
class Options:
    """How to convert. measure: decode everything again and compare; verify: read it back from the file as well;
    calibration: what the weights are multiplied by; repair: a file of what takes back errors, to be written beside."""

    device: str = "cpu"
    effort: str = "reference"
    measure: bool = False
    verify: bool = False
    calibration: Calibration | None = None
    repair: Repair | None = None


@dataclass(frozen=True)
class _Piece:
    """Rows [start, stop) of a source."""

    source: StoredTensor
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.source.nbytes * (self.stop - self.start) // self.source.rows


@dataclass(frozen=True)
class _Chunk:
    """Pieces that become the rows from `first_row` on of an output tensor."""

    tensor: OutTensor
    pieces: tuple[_Piece, ...]
    first_row: int

    @property
    def rows(self) -> int:
        return sum(piece.stop - piece.start for piece in self.pieces)

    @property
    def weights(self) -> int:
        return self.rows * self.tensor.columns

    @property
    def source_bytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)

    @property
    def files(self) -> tuple[Path, ...]:
        """Where its pieces lie."""
        return tuple(sorted({entry.path for piece in self.pieces for entry in piece.source.parts.values()}))

    @property
    def passes(self) -> bool:
        """Whether the bytes are in the wanted format already and need no arithmetic."""
        tensor, source = self.tensor, self.pieces[0].source
        same = source.is_as_stored and tensor.format == source.format and tensor.options == source.options
        kinds = {suffix: entry.kind for suffix, entry in source.parts.items()}
        # Scales may be stored in another float than we write; bytes of 8-bit floats may be typed as integers.
        complete = set(kinds) == set(tensor.layout) and all(
            kinds[suffix] == dtype or kinds[suffix] not in FLOATS for suffix, (dtype, _) in tensor.layout.items()
        )
        whole = len(self.pieces) == 1 and source.first_row == 0 and self.rows == tensor.rows
        return same and complete and (whole or not tensor.format.per_tensor)


def convert(
    source: Checkpoint,
    target: Target,
    out: Path,
    *,
    extra: Mapping[str, Any] | None = None,
    options: Options | None = None,
    files: Files | None = None,
    on_bytes: OnBytes = lambda n: None,
) -> list[TensorError]:
    """Write `source` to the file `out` as the target says. extra: metadata to add; files: brings those of the source.

    Returns what was measured, if anything was asked for. Raises UserError for NaN weights, a full disk, a damaged
    source or one that changes meanwhile; then nothing is left of the output.
    """
    options = options or Options()
    tensors = output_tensors(source, target)
    file = lay_out(tensors, target, {**metadata(source, target), **(extra or {})})
    chunks_of = list(_chunks(tensors))
    changed = {chunk.tensor.name: chunk.tensor for chunk in chunks_of if not chunk.passes and _repairable(chunk.tensor)}
    repair = options.repair if source.component == "transformer" else None
    with (
        open_writer(out, file.header, file.total_bytes, precious=True) as writer,
        open_repair(repair, changed.values(), options.calibration) as repairs,
    ):
        for offset, content in file.markers.items():
            writer.write(offset, torch.frombuffer(bytearray(content), dtype=torch.uint8))
        carrier = _Carrier(writer, file, options, repairs)
        for chunks in _brought(iter(chunks_of), files):
            for chunk, found in _run(carrier, chunks):
                carrier.add(chunk, found)
                on_bytes(chunk.source_bytes)
        source.require_unchanged()
    return carrier.errors


def _repairable(tensor: OutTensor) -> bool:
    return tensor.format.lossy and len(tensor.shape) == 2


def _chunks(tensors: list[OutTensor]) -> Iterator[_Chunk]:
    for tensor in tensors:
        if not tensor.columns:
            continue
        if tensor.format.per_tensor:
            yield _Chunk(tensor, tuple(_Piece(source, 0, source.rows) for source in tensor.sources), 0)
            continue
        first = 0
        for source in tensor.sources:
            step = source.piece_rows(CHUNK_WEIGHTS)
            for start in range(0, source.rows, step):
                stop = min(start + step, source.rows)
                yield _Chunk(tensor, (_Piece(source, start, stop),), first + start)
            first += source.rows


def _brought(chunks: Iterator[_Chunk], files: Files | None) -> Iterator[Iterable[_Chunk]]:
    """The chunks in groups that read from the same files, whose files are there while their group is worked on."""
    if files is None:
        yield chunks
        return
    groups: dict[tuple[Path, ...], list[_Chunk]] = {}
    for chunk in chunks:
        groups.setdefault(chunk.files, []).append(chunk)
    here: set[Path] = set()
    for wanted in sorted(groups):
        for path in here.difference(wanted):
            files.release(path)
        for path in wanted:
            files.fetch(path)
        here = set(wanted)
        yield groups[wanted]
    for path in here:
        files.release(path)


class _Carrier:
    """Takes a chunk from the source to the output; several threads call it at once."""

    def __init__(
        self, writer: TensorWriter, file: OutputFile, options: Options, repairs: RepairWriter | None = None
    ) -> None:
        self.writer, self.file, self.options, self.repairs = writer, file, options, repairs
        self._sums: dict[str, tuple[OutTensor, Sums]] = {}

    def __call__(self, chunk: _Chunk) -> Sums | None:
        """What was measured of the chunk."""
        found = self._passed_on(chunk) if chunk.passes else self._encoded(chunk)
        if self.repairs is not None:
            self.repairs.finish(chunk.tensor)
        return found

    def _encoded(self, chunk: _Chunk) -> Sums | None:
        wide, tensor, found = _read_wide(chunk), chunk.tensor, None
        step = chunk.rows if tensor.format.per_tensor else max(CHUNK_WEIGHTS // tensor.columns, 1)
        for start in range(0, chunk.rows, step):
            rows = wide[start : start + step]
            parts = _encode(tensor, rows, chunk.pieces[0].source, self.options)
            self._write(tensor, parts, chunk.first_row + start)
            more = self._measured(chunk, rows, parts, chunk.first_row + start, len(rows))
            found = more if found is None or more is None else found + more
        return found

    def add(self, chunk: _Chunk, found: Sums | None) -> None:
        if found is not None:
            before = self._sums.get(chunk.tensor.name, (chunk.tensor, Sums()))[1]
            self._sums[chunk.tensor.name] = chunk.tensor, before + found

    @property
    def errors(self) -> list[TensorError]:
        return [
            TensorError(tensor.name, tensor.sources[0].name, tensor.format.name, tensor.nbytes, total)
            for tensor, total in self._sums.values()
        ]

    def _passed_on(self, chunk: _Chunk) -> Sums | None:
        piece = chunk.pieces[0]
        packed = piece.source.read(piece.start, piece.stop)
        if not packed.is_finite():
            raise piece.source.not_finite()
        self._write(chunk.tensor, packed.parts, chunk.first_row)
        return self._measured(chunk, None, packed.parts, chunk.first_row, chunk.rows)

    def _write(self, tensor: OutTensor, parts: Parts, first_row: int) -> None:
        for suffix, part in parts.items():
            offset = self.file.places[tensor.name, suffix]
            dtype, shape = tensor.layout[suffix]
            assert part.dtype == TORCH_DTYPES[dtype], f"{tensor.name}{suffix} is {part.dtype}"
            if len(shape) == 2:
                offset += first_row * part.element_size() * shape[1]
            self.writer.write(offset, part)
            if self.options.verify and not self.writer.holds(offset, part):
                raise UserError(
                    f"{tensor.name}: what was written reads back differently", fix="the disk is failing, use another"
                )

    def _measured(self, chunk: _Chunk, wide: Tensor | None, parts: Parts, first: int, rows: int) -> Sums | None:
        """wide: the weights before they were encoded; None: they were passed on as they are."""
        tensor, repairs = chunk.tensor, self.repairs if self.repairs and self.repairs.wants(chunk.tensor) else None
        if not self.options.measure and repairs is None:
            return None
        decoded = QTensor(tensor.format, (rows, tensor.columns), dict(parts), tensor.options).dequantize()
        wide = decoded if wide is None else wide
        found = sums(wide, decoded) if self.options.measure else None
        if repairs is not None:
            repairs.add(tensor, first, torch.sub(wide, decoded, out=decoded))
        return found


def _read_wide(chunk: _Chunk) -> Tensor:
    """[rows, columns] float32. Raises UserError for NaN or infinity."""
    if len(chunk.pieces) == 1 and chunk.weights <= 2 * CHUNK_WEIGHTS:
        piece = chunk.pieces[0]
        return piece.source.read_float(piece.start, piece.stop)
    wide = torch.empty(chunk.rows, chunk.tensor.columns)
    at = 0
    for piece in chunk.pieces:
        step = piece.source.piece_rows(CHUNK_WEIGHTS)
        for start in range(piece.start, piece.stop, step):
            stop = min(start + step, piece.stop)
            wide[at : at + stop - start] = piece.source.read_float(start, stop)
            at += stop - start
    return wide


def _encode(tensor: OutTensor, wide: Tensor, source: StoredTensor, options: Options) -> Parts:
    """The parts as they go into the file, on the CPU. Raises UserError for weights that the format cannot hold."""
    inputs = options.calibration.inputs(tensor.sources[0].name) if options.calibration else None
    parts = tensor.format.codec.quantize(wide.to(options.device), tensor.options, options.effort, inputs)
    low, high = torch.aminmax(wide)
    if (
        max(-low, high) > SAFE_WEIGHT
        and not QTensor(tensor.format, tuple(wide.shape), parts, tensor.options).is_finite()
    ):
        largest = f"{max(-low, high):.3g}"
        raise UserError(f"{source.where} is too large for {tensor.format.name}", got=largest, fix="choose bf16 or int8")
    return {suffix: part.cpu() for suffix, part in parts.items()}


_Done = tuple[int, _Chunk, "Sums | None", "BaseException | None"]


def _run(carrier: _Carrier, chunks: Iterable[_Chunk]) -> Iterator[tuple[_Chunk, Sums | None]]:
    """Chunks as they are done, on as many threads as there are cores and one more, which reads while they compute.

    They come by a queue, and no future is touched: an interrupt can leave a future's lock held, for which its worker
    would then wait for ever."""
    workers = min((os.cpu_count() or 1) + 1, 8)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pool, done = ThreadPoolExecutor(workers), SimpleQueue[_Done]()
    pending: dict[int, int] = {}  # weights of each chunk, by its number
    try:
        for number, chunk in enumerate(_read_ahead(chunks)):
            while pending and (
                len(pending) >= 2 * workers or sum(pending.values()) + chunk.weights > IN_FLIGHT_WEIGHTS
            ):
                yield _next(done, pending)
            pending[number] = chunk.weights
            pool.submit(_carried, carrier, number, chunk, done)
        while pending:
            yield _next(done, pending)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def _carried(carrier: _Carrier, number: int, chunk: _Chunk, done: SimpleQueue[_Done]) -> None:
    try:
        done.put((number, chunk, carrier(chunk), None))
    except BaseException as error:  # noqa: BLE001 - raised where it is waited for
        done.put((number, chunk, None, error))


def _next(done: SimpleQueue[_Done], pending: dict[int, int]) -> tuple[_Chunk, Sums | None]:
    number, chunk, found, error = done.get()
    del pending[number]
    if error is not None:
        raise error
    return chunk, found


def _read_ahead(chunks: Iterable[_Chunk]) -> Iterator[_Chunk]:
    """The same chunks, while the system reads those that follow: the disk should never wait for the processor."""
    coming: deque[_Chunk] = deque()
    coming_bytes = 0
    for chunk in chunks:
        for piece in chunk.pieces:
            piece.source.will_read(piece.start, piece.stop)
        coming.append(chunk)
        coming_bytes += chunk.source_bytes
        while coming_bytes > READ_AHEAD_BYTES:
            coming_bytes -= coming[0].source_bytes
            yield coming.popleft()
    yield from coming
