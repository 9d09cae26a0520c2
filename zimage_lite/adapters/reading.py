"""Opens an adapter: a file, or a PEFT folder. Reads headers; the tensors stay where they are until they are applied."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..checkpoint.container import file_stamp
from ..checkpoint.json_file import read_json
from ..checkpoint.opening import open_tensor_file
from ..checkpoint.weight_files import weight_set
from ..config import TransformerConfig
from ..errors import FileFormatError, UserError, WrongModelError
from ..quant.tensor import TORCH_DTYPES, all_finite
from .spelling import Target, is_text_encoder, split, squashed, stranger, table
from .updates import Params, Raw, Update, updates_of

ADAPTER_CONFIG = "adapter_config.json"
_METADATA = "lora_adapter_metadata"  # diffusers' own, JSON
_DROPPED = re.compile(r"(?:.*\.)?(?:_aux|bundle_emb)[._]")  # a trainer's state, textual inversions

ScaleOf = Callable[[int], float]


@dataclass(frozen=True)
class Applied:
    """One update and the module whose rows it changes."""

    target: Target
    kind: str
    update: Update
    all_targets: tuple[Target, ...]  # of the module as the file has it, fused ones together


@dataclass(frozen=True)
class Adapter:
    """path: what was named; file: of its tensors; applied: what it changes; unused: names without a place here;
    unknown: modules that they belong to."""

    path: Path
    file: Path
    applied: tuple[Applied, ...]
    unused: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    raws: Mapping[str, Raw] = field(default_factory=dict)
    stamp: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        return self.path.stem if self.path == self.file else self.path.name

    @cached_property
    def modules(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(one.target.module for one in self.applied))

    @cached_property
    def sha256(self) -> str:
        """Of the whole file, by which model sites know it."""
        digest = hashlib.sha256()
        with open(self.file, "rb") as file:
            while piece := file.read(2**22):
                digest.update(piece)
        return digest.hexdigest()

    def require_sound(self) -> None:
        """Raise UserError if the file changed since it was opened, or holds what is no number. Reads all of it."""
        if file_stamp(self.file) != self.stamp:
            raise FileFormatError(f"{self.file} changed while it was read", fix="wait until it is complete")
        for name, raw in self.raws.items():
            if not name.endswith("alpha") and not all_finite(raw.read()):  # alpha is looked at where it counts
                raise FileFormatError(f"{self.file}: {name} holds NaN or infinity", fix="get the file again")


def open_adapter(path: Path, config: TransformerConfig) -> Adapter:
    """config: of the transformer that it is for. Raises UserError for what cannot be applied, and says why."""
    file = weight_set(path).files[0] if path.is_dir() else path
    opened = open_tensor_file(file)
    if opened.container != "safetensors":
        raise UserError(f"{path}: a GGUF file, not an adapter", fix="get the safetensors version")
    raws = {name: Raw(entry) for name, entry in opened.entries.items()}
    modules, unused = _by_module(raws, path)
    scales = _scales(path, opened.metadata)
    applied, unknown = list[Applied](), list[str]()  # of modules
    known = table(config)
    named = (known.get(squashed(name), ()) for name in modules)
    alone = {targets[0].module for targets in named if len(targets) == 1}
    for name, params in modules.items():
        targets = known.get(squashed(name))
        if targets is None:
            unknown.append(name)
            unused += [raw.entry.name for raw in params.values()]
            continue
        where = f"{path}: {name}"
        for kind, update in updates_of(params, where, targets[0], scales(name)).items():
            own = [t for t in targets if not (t.is_part and t.module in alone)]  # some files have both, the same twice
            applied += [Applied(target, kind, update, targets) for target in own]
    found = Adapter(path, file, tuple(applied), tuple(unused), tuple(unknown), opened.metadata, raws, opened.stamp)
    if not applied:
        _refuse(found)
    for one in applied:
        if not one.target.is_linear and any(part not in ("dense", "bias") for part in one.update.shapes(one.target)):
            raise WrongModelError(f"{path}: {one.target.module}", got=one.kind, expected="a difference of the vector")
    return found


def _by_module(raws: Mapping[str, Raw], path: Path) -> tuple[dict[str, Params], list[str]]:
    """-> module as the file spells it -> its tensors by what they are; names that belong to no module here."""
    found, spelled, unused = dict[str, dict[str, Raw]](), dict[str, str](), list[str]()
    for name, raw in raws.items():
        key = None if is_text_encoder(name) or _DROPPED.match(name) else split(name)
        if key is None:
            unused.append(name)
            continue
        if raw.entry.kind not in TORCH_DTYPES or not TORCH_DTYPES[raw.entry.kind].is_floating_point:
            raise FileFormatError(f"{path}: {name}", got=raw.entry.kind, expected="floats")
        module = spelled.setdefault(squashed(key.module), key.module)
        params = found.setdefault(module, {})
        if key.parameter in params:
            raise FileFormatError(f"{path}: {module} has {key.parameter} twice, under two spellings")
        params[key.parameter] = raw
    return dict(found.items()), unused


def _scales(path: Path, metadata: Mapping[str, Any]) -> Callable[[str], ScaleOf | None]:
    """module -> rank -> scale, as a PEFT config or diffusers' metadata says; None where only the tensors can tell."""
    config: Mapping[str, Any] = {}
    if path.is_dir() and (path / ADAPTER_CONFIG).exists():
        config = read_json(path / ADAPTER_CONFIG)
    elif _METADATA in metadata:
        try:
            said = json.loads(metadata[_METADATA])
        except (ValueError, RecursionError) as error:
            raise FileFormatError(f"{path}: metadata {_METADATA} is not JSON") from error
        config = {key.removeprefix("transformer."): value for key, value in said.items()} if said else {}
    alpha, patterns = config.get("lora_alpha", config.get("alpha")), config.get("alpha_pattern") or {}
    if not isinstance(alpha, int | float) or not isinstance(patterns, dict):
        return lambda module: None
    ranks, own_rank = config.get("rank_pattern") or {}, config.get("r") or 1
    rooted = bool(config.get("use_rslora"))

    def of(module: str) -> ScaleOf:
        own = _matching(patterns, module, alpha)

        def scale(rank: int) -> float:
            rank = rank or _matching(ranks, module, own_rank)  # of a LoKr with whole factors it is written nowhere else
            return own / (math.sqrt(rank) if rooted else rank)

        return scale

    return of


def _matching(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """As PEFT reads its patterns: the end of a module's name, or a regular expression for it."""
    return next((value for pattern, value in patterns.items() if re.fullmatch(rf"(.*\.)?({pattern})", module)), default)


def _refuse(adapter: Adapter) -> None:
    """Raise for an adapter of which nothing can be applied."""
    path, names = adapter.path, list(adapter.raws)
    models = list(filter(None, map(stranger, names)))
    if models:
        raise WrongModelError(f"{path}: made for {models[0]}", expected="a LoRA for Z-Image")
    if names and all(map(is_text_encoder, names)):
        raise WrongModelError(f"{path}: changes only the text encoder, which adapters leave alone here")
    sample = ", ".join(name[:60] for name in sorted(names)[:3]) or "no tensors"
    raise WrongModelError(
        f"{path}: no adapter for Z-Image",
        got=f"{len(names)} tensors ({sample})",
        expected="a LoRA, LoHa, LoKr, DoRA or OFT",
    )


def kinds(adapter: Adapter) -> dict[str, int]:
    """Kind -> number of modules that it changes, most first."""
    counts: dict[str, set[str]] = {}
    for one in adapter.applied:
        counts.setdefault(one.kind, set()).add(one.target.module)
    return dict(sorted(((kind, len(modules)) for kind, modules in counts.items()), key=lambda pair: -pair[1]))


def ranks(adapter: Adapter) -> Iterator[int]:
    """Of each low-rank pair."""
    for one in adapter.applied:
        shape = one.update.shapes(one.target).get("a")
        if shape:
            yield shape[0]
