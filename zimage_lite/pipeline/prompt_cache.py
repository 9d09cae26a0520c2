"""Prompt embeddings kept on the disk, so that the same prompt never loads the text encoder again.

One safetensors file per prompt, named by a hash, for prompts are private. A cache may never be in the way: what cannot
be read is computed, what cannot be written is not kept, and what is damaged goes. Files appear whole, so any number of
processes may share the folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from ..cache_root import cache_root
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.container import Entry
from ..checkpoint.safetensors import encode_header, read_header
from ..checkpoint.writer import open_writer
from ..errors import FileFormatError, UserError
from ..quant.tensor import TORCH_DTYPES

ARITHMETIC = 1  # raise it when a change to the text encoder or to the formats changes what comes out
LIMIT_BYTES = 256_000_000  # 800 prompts of 60 tokens in 16 bits, or 50 of the longest in float32

_TENSOR, _KEY, _SUM = "embedding", "zimage_lite.key", "zimage_lite.sha256"
_OURS = re.compile(r"\.?[0-9a-f]{64}\.safetensors(\.\d+\.partial)?")  # nothing else in the folder is ever removed
_LABELS = {dtype: label for label, dtype in TORCH_DTYPES.items() if dtype.is_floating_point}
_log = logging.getLogger(__name__)


def cache_folder() -> Path | None:
    """Where embeddings are kept, or None if nowhere."""
    root = cache_root()
    return None if root is None else root / "prompts"


def embedding_key(token_ids: Sequence[int], encoder: Checkpoint, dtype: torch.dtype) -> str:
    """A name for what this encoder makes of these tokens, computing in `dtype`: 64 hexadecimal digits.

    Not of the device: there the same prompt differs by rounding only.
    """
    said = [ARITHMETIC, torch.__version__, str(dtype), encoder.fingerprint, list(token_ids)]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


class PromptCache:
    """folder: made when it is needed; None keeps nothing. No call raises for what the disk does."""

    def __init__(self, folder: Path | None, limit_bytes: int = LIMIT_BYTES) -> None:
        self.folder, self.limit_bytes = folder, limit_bytes
        self._room = -1  # bytes until the folder has to be counted again: thousands of prompts may come in a row

    def get(self, key: str) -> Tensor | None:
        """What was put under this key, on the CPU: [tokens, width], same dtype, same bits."""
        if self.folder is None:
            return None
        path = self.folder / f"{key}.safetensors"
        try:
            found = _read(path, key)
            os.utime(path)  # the last use, by which files go
        except FileNotFoundError:
            return None
        except FileFormatError as error:
            _log.debug("removed a damaged embedding: %s", error)
            _remove(path)
            return None
        except (OSError, UserError) as error:
            _log.debug("an embedding cannot be read: %s", error)
            return None
        return found

    def put(self, key: str, embedding: Tensor) -> None:
        """Keep a [tokens, width] tensor of floats, and let go of the least recently used if there are too many."""
        if self.folder is None:
            return
        embedding = embedding.detach().cpu().contiguous()
        label, digest = _LABELS[embedding.dtype], _digest(embedding)
        header, (offset,) = encode_header([(_TENSOR, label, tuple(embedding.shape))], {_KEY: key, _SUM: digest})
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with open_writer(self.folder / f"{key}.safetensors", header, offset + embedding.nbytes) as writer:
                writer.write(offset, embedding)
            self._room -= offset + embedding.nbytes
            if self._room < 0:
                self._trim()
        except (OSError, UserError) as error:
            _log.debug("an embedding cannot be kept: %s", error)

    def _trim(self) -> None:
        """Count what is there; if that is too much, let some more go than must. Other processes may do the same at
        once, so any file may be gone."""
        assert self.folder is not None
        found = []
        for path in self.folder.iterdir():
            with suppress(OSError):
                if _OURS.fullmatch(path.name):
                    facts = path.stat()
                    found.append((facts.st_mtime_ns, facts.st_size, path))
        total = sum(size for _, size, _ in found)
        goal = self.limit_bytes if total <= self.limit_bytes else self.limit_bytes * 15 // 16
        for _, size, path in sorted(found):
            if total <= goal:
                break
            _remove(path)
            total -= size
        self._room = self.limit_bytes - total


def _read(path: Path, key: str) -> Tensor:
    """Raises OSError, or FileFormatError if this is not what `put` wrote under the key."""
    file = read_header(path)
    entry: Entry | None = file.entries.get(_TENSOR)
    if len(file.entries) != 1 or entry is None or len(entry.shape) != 2 or file.metadata.get(_KEY) != key:
        raise FileFormatError(f"{path}: not an embedding, or another one")
    dtype = TORCH_DTYPES[entry.kind]
    found = entry.read()
    if dtype not in _LABELS or hashlib.sha256(found.numpy().data).hexdigest() != file.metadata.get(_SUM):
        raise FileFormatError(f"{path}: changed since it was written")
    return found.view(dtype).view(entry.shape)


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.flatten().view(torch.uint8).numpy().data).hexdigest()


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink(missing_ok=True)
