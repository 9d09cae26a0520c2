"""Opens an adapter: a file, or a PEFT folder. Reads headers; the tensors stay where they are until they are applied."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
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
from .recognition import Params, ScaleOf, updates_of
from .spelling import Target, is_text_encoder, split, squashed, stranger, table
from .updates import Raw, Update

ADAPTER_CONFIG = "adapter_config.json"
_PEFT_FILE = "adapter_model.safetensors"
_METADATA = "lora_adapter_metadata"  # diffusers' own, JSON
_DROPPED = re.compile(r"(?:.*\.)?(?:_aux|bundle_emb)[._]")  # a trainer's state, textual inversions


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
    scales = _scales(_config_of(file, path, opened.metadata), path)
    applied, unknown = list[Applied](), list[str]()  # of modules
    known, taken = table(config), set[tuple[str, str]]()
    for name, params in sorted(modules.items(), key=lambda named: _standing(named[0], known)):
        targets = known.get(squashed(name))
        if targets is None:
            unknown.append(name)
            unused += [raw.entry.name for raw in params.values()]
            continue
        for kind, update in updates_of(params, f"{path}: {name}", targets[0], scales(name)).items():
            own = [target for target in targets if (target.module, kind) not in taken]
            taken |= {(target.module, kind) for target in own}
            applied += [Applied(target, kind, update, targets) for target in own]
    found = Adapter(path, file, tuple(applied), tuple(unused), tuple(unknown), opened.metadata, raws, opened.stamp)
    if not applied:
        _refuse(found)
    return found


def _standing(name: str, known: Mapping[str, tuple[Target, ...]]) -> int:
    """Some files hold one update under several names: a module's own counts before others, that of a fused one last."""
    targets = known.get(squashed(name), ())
    return 2 if len(targets) > 1 else int(not targets or squashed(targets[0].module) != squashed(name))


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


def _config_of(file: Path, path: Path, metadata: Mapping[str, Any]) -> Mapping[str, Any]:
    """What PEFT's config beside the file, or diffusers' metadata in it, says; empty where only the tensors can tell."""
    beside = file.with_name(ADAPTER_CONFIG)
    if (path.is_dir() or file.name == _PEFT_FILE) and beside.exists():
        config = read_json(beside)
    else:
        try:
            said = json.loads(metadata.get(_METADATA, "{}"))
        except (ValueError, RecursionError) as error:
            raise FileFormatError(f"{path}: metadata {_METADATA} is not JSON") from error
        config = {key.removeprefix("transformer."): said[key] for key in said} if isinstance(said, dict) else {}
    if config.get("use_cayley_neumann") is False or config.get("num_cayley_neumann_terms", 5) != 5:
        raise WrongModelError(f"{path}: OFT", got="another series than PEFT's own", expected="5 Cayley-Neumann terms")
    return config


def _scales(config: Mapping[str, Any], path: Path) -> Callable[[str], ScaleOf | None]:
    """module -> rank -> scale."""
    usual = config.get("lora_alpha", config.get("alpha"))
    if usual is None:
        return lambda module: None
    alphas, ranks = (_patterns(config, name, path) for name in ("alpha_pattern", "rank_pattern"))

    def of(module: str) -> ScaleOf:
        alpha = _matching(alphas, module, usual)

        def scale(rank: int) -> float:
            rank = rank or _matching(ranks, module, config.get("r"))  # of a LoKr with whole factors
            if not (_is_number(alpha) and _is_number(rank) and rank > 0):
                got = f"{alpha} and {rank}"
                raise FileFormatError(f"{path}: alpha and rank of {module}", got=got, expected="numbers")
            return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))

        return scale

    return of


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _patterns(config: Mapping[str, Any], name: str, path: Path) -> dict[re.Pattern[str], Any]:
    """As PEFT reads them: the end of a module's name, or a regular expression for it."""
    found = config.get(name)
    try:
        return {re.compile(rf"(.*\.)?({own})"): value for own, value in (found or {}).items()}
    except (AttributeError, re.error) as error:
        raise FileFormatError(f"{path}: {name}", got=found, expected="patterns of modules' names") from error


def _matching(patterns: Mapping[re.Pattern[str], Any], module: str, default: Any) -> Any:
    return next((value for pattern, value in patterns.items() if pattern.fullmatch(module)), default)


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
