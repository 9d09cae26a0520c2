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

from ..checkpoint.container import Entry, file_stamp
from ..checkpoint.json_file import read_json
from ..checkpoint.opening import open_tensor_file
from ..checkpoint.weight_files import ADAPTER_CONFIG, require_whole, weight_set
from ..config import TransformerConfig
from ..errors import FileFormatError, UserError, WrongModelError
from ..quant.tensor import TORCH_DTYPES, all_finite
from ..units import counted
from .recognition import NO_KIND, SCALES, Params, ScaleOf, updates_of
from .spelling import Target, is_text_encoder, owner_of, split, squashed, stranger, table
from .updates import Raw, Update

_PEFT_FILE = "adapter_model.safetensors"
_METADATA = "lora_adapter_metadata"  # diffusers' own, JSON
TRAINING_KEY = "zimage_lite.training"  # metadata of a file with all that a training goes on with
# What of PEFT's config changes what tensors of the same names mean -> what is known here.
_KNOWN: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA", "LOHA", "LOKR", "OFT"),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),  # others change the weights they start from
    "layer_replication": (None,),
    "use_cayley_neumann": (True,),
    "num_cayley_neumann_terms": (5,),
    "coft": (False,),
}
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
    unknown: modules that they belong to; stamp, config_stamp: of the file and of PEFT's config beside it when they were
    opened."""

    path: Path
    file: Path
    applied: tuple[Applied, ...]
    unused: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    raws: Mapping[str, Raw] = field(default_factory=dict)
    stamp: tuple[int, ...] = ()
    config_stamp: tuple[int, ...] = ()

    @property
    def is_current(self) -> bool:
        """Whether both files are as they were."""
        return (file_stamp(self.file), _config_stamp(self.file)) == (self.stamp, self.config_stamp)

    @property
    def name(self) -> str:
        return self.path.stem if self.path == self.file else self.path.name

    @cached_property
    def modules(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(one.target.module for one in self.applied))

    def checked(self) -> tuple[str, str]:
        """The SHA-256 of the whole file and of what follows its header, by which model sites know it. All of it is read
        for this, once, and looked at: raises UserError if it changed since it was opened, or holds what is no
        number."""
        digest, body, at = hashlib.sha256(), hashlib.sha256(), 0
        for raw in sorted(self.raws.values(), key=lambda raw: raw.entry.offset):
            for some in (digest, body) if at else (digest,):  # what comes before the first is the header
                some.update(self._between(at, raw.entry.offset))
            stored, at = raw.stored(), raw.entry.offset + raw.entry.nbytes
            for some in (digest, body):
                some.update(stored.numpy().data)
            name = raw.entry.name
            if not name.endswith("alpha") and not all_finite(raw.wide(stored)):  # alpha is looked at where it counts
                raise FileFormatError(f"{self.file}: {name} holds NaN or infinity", fix="get the file again")
        for some in (digest, body):
            some.update(self._between(at, self.stamp[0]))
        return digest.hexdigest(), body.hexdigest()

    def _between(self, start: int, stop: int) -> memoryview:
        """Bytes of the file that belong to no tensor."""
        n_bytes = stop - start
        return Raw(Entry(self.file, "(none)", "U8", (n_bytes,), start, n_bytes), self.stamp).stored().numpy().data


def file_of(path: Path) -> Path:
    """The one that holds an adapter: itself, or of a folder. Raises UserError."""
    files = weight_set(path).files if path.is_dir() else (path,)
    if len(files) > 1:
        raise UserError(f"{path}", got=f"an adapter in {len(files)} shards", expected="one file")
    require_whole(files[0])
    return files[0]


def open_adapter(path: Path, config: TransformerConfig) -> Adapter:
    """config: of the transformer that it is for. Raises UserError for what cannot be applied, and says why."""
    file = file_of(path)
    config_stamp, opened = _config_stamp(file), open_tensor_file(file)
    if opened.container != "safetensors":
        raise UserError(f"{path}: a GGUF file, not an adapter", fix="get the safetensors version")
    if TRAINING_KEY in opened.metadata:
        fix = "name the file that came out, or step-*.safetensors beside this one"
        raise FileFormatError(f"{path}: the state of a training, for train-lora --resume, not a LoRA", fix=fix)
    raws = {name: Raw(entry, opened.stamp) for name, entry in opened.entries.items()}
    modules, unused = _by_module(raws, path)
    scales = _scales(_config_of(file, path, opened.metadata), path)
    applied, unknown = list[Applied](), list[str]()  # of modules
    known, taken = table(config), set[tuple[str, str]]()
    for name, params in sorted(modules.items(), key=lambda named: _standing(named[0], known)):
        targets = known.get(squashed(name), ())
        updates = updates_of(params, f"{path}: {name}", targets[0], scales(name)) if targets else {}
        unknown += [] if targets else [name]
        own = [
            Applied(target, kind, update, targets)
            for kind, update in updates.items()
            for target in targets
            if (target.module, kind) not in taken
        ]
        taken |= {(one.target.module, one.kind) for one in own}
        applied += own
        if not own:  # or all of it was said under another name
            unused += [raw.entry.name for raw in params.values()]
    found = Adapter(
        path, file, tuple(applied), tuple(unused), tuple(unknown), opened.metadata, raws, opened.stamp, config_stamp
    )
    if not applied:
        _refuse(found)
    _require_explained(found, known)
    return found


def _require_explained(adapter: Adapter, known: Mapping[str, tuple[Target, ...]]) -> None:
    """Raise WrongModelError for a tensor of no known kind of a module that changes: it may scale what is known."""
    for name in adapter.unused:
        owner = known.get(owner_of(name, known), ()) if split(name) is None else ()
        if any(target.module in adapter.modules for target in owner):
            raise WrongModelError(f"{adapter.path}: {name[:200]} {NO_KIND}")


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
        is_float = raw.entry.kind in TORCH_DTYPES and TORCH_DTYPES[raw.entry.kind].is_floating_point
        if not is_float and key.parameter not in SCALES:
            raise FileFormatError(f"{path}: {name}", got=raw.entry.kind, expected="floats")
        module = spelled.setdefault(squashed(key.module), key.module)
        params = found.setdefault(module, {})
        if key.parameter in params:
            raise FileFormatError(f"{path}: {module} has {key.parameter} twice, under two spellings")
        params[key.parameter] = raw
    return dict(found.items()), unused


def _config_stamp(file: Path) -> tuple[int, ...]:
    return file_stamp(file.with_name(ADAPTER_CONFIG))


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
    for name, known in _KNOWN.items():
        if config.get(name) is not None and config[name] not in known:
            raise WrongModelError(f"{path}: {name}", got=repr(config[name])[:60], expected=f"one of {known}"[:100])
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
        got=f"{counted(len(names), 'tensor')} ({sample})",
        expected="a LoRA, LoHa, LoKr, DoRA or OFT",
    )


def kinds(adapter: Adapter) -> dict[str, int]:
    """Kind -> number of modules that it changes, most first."""
    counts: dict[str, set[str]] = {}
    for one in adapter.applied:
        counts.setdefault(one.kind, set()).add(one.target.module)
    return dict(sorted(((kind, len(modules)) for kind, modules in counts.items()), key=lambda pair: -pair[1]))
