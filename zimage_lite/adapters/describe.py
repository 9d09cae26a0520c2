"""What an adapter's file is, for `inspect`. Reads headers, and of tensors only the scalars."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.opening import open_tensor_file
from ..checkpoint.weight_files import ADAPTER_CONFIG
from ..config import TransformerConfig
from ..errors import UserError, WrongModelError
from ..units import counted, format_gb
from .reading import TRAINING_KEY, Adapter, file_of, kinds, open_adapter
from .recognition import OtherSizesError
from .spelling import is_text_encoder, split
from .updates import Dora, LowRank

# What tells who wrote a file: a key of its metadata, or a part of its tensors' names. First hit wins.
_IN_METADATA = {"ot_revision": "OneTrainer", "ot_branch": "OneTrainer", "ot_config": "OneTrainer"}
_IN_NAMES = {
    "lora_unet__": "VideoX-Fun", "lycoris_": "LyCORIS", ".default.weight": "DiffSynth-Studio",
    "base_model.model.": "PEFT", "lora_unet_": "musubi-tuner, or kohya names",
    "transformer.": "diffusers, SimpleTuner or OneTrainer",
    "diffusion_model.": "ai-toolkit, or converted for ComfyUI",
}  # fmt: skip
_BASES = ("ss_base_model_version", "modelspec.architecture", "ss_sd_model_name", "base_model_name_or_path")


@dataclass(frozen=True)
class Description:
    """model: that it is for; kinds: name -> modules; ranks, scales: value -> modules (scale: alpha / rank); modules: of
    the transformer, that change; unknown: modules of the file without a place; unused: names of tensors that are left
    out."""

    name: str
    model: str
    trainer: str
    base: str
    bytes: int
    dtypes: tuple[str, ...]
    kinds: Mapping[str, int]
    ranks: Mapping[int, int]
    scales: Mapping[float, int]
    modules: int
    unknown: tuple[str, ...]
    unused: tuple[str, ...]

    def facts(self) -> dict[str, Any]:
        return asdict(self)


def is_adapter_path(path: Path) -> bool:
    """A PEFT folder, or a file of nothing but an adapter's tensors, or a folder with one such file. The state of a
    training counts, so that it is told as one."""
    if (path / ADAPTER_CONFIG).exists():
        return True
    try:
        opened = open_tensor_file(file_of(path))
    except UserError:
        return False  # told where it is read as a model
    adapting = sum(split(name) is not None for name in opened.entries)
    return TRAINING_KEY in opened.metadata or adapting > len(opened.entries) / 2


def describe(path: Path, configs: Mapping[str, TransformerConfig]) -> Description:
    """configs: name -> of the models that it may be for; the first that it fits. Raises UserError if it fits none: what
    is wrong with it beside the first whose sizes it has."""
    wrong = list[WrongModelError]()
    for model, config in configs.items():
        found = _tried(path, model, config)
        if isinstance(found, Description):
            return found
        wrong.append(found)
    raise next((error for error in wrong if not isinstance(error, OtherSizesError)), wrong[0])


def _tried(path: Path, model: str, config: TransformerConfig) -> Description | WrongModelError:
    try:
        return _described(open_adapter(path, config), model)
    except WrongModelError as error:
        return error


def _described(adapter: Adapter, model: str) -> Description:
    low_rank = [one.update.inner if isinstance(one.update, Dora) else one.update for one in adapter.applied]
    pairs = [update for update in low_rank if isinstance(update, LowRank)]
    return Description(
        name=adapter.name,
        model=model,
        trainer=_trainer(adapter),
        base=next((str(adapter.metadata[key])[:80] for key in _BASES if adapter.metadata.get(key)), ""),
        bytes=sum(raw.entry.nbytes for raw in adapter.raws.values()),
        dtypes=tuple(sorted({raw.entry.kind for raw in adapter.raws.values()})),
        kinds=kinds(adapter),
        ranks=dict(Counter(update.rank for update in pairs)),
        scales=dict(Counter(round(update.scale, 6) for update in pairs)),
        modules=len(adapter.modules),
        unknown=adapter.unknown,
        unused=adapter.unused,
    )


def _trainer(adapter: Adapter) -> str:
    said = adapter.metadata.get("software")
    if isinstance(said, str):
        try:
            return str(json.loads(said)["name"])[:40]  # ai-toolkit
        except (ValueError, TypeError, KeyError):
            return said[:40]
    if "zimage" in str(adapter.metadata.get("ss_network_module", "")):
        return "musubi-tuner"
    found = [name for key, name in _IN_METADATA.items() if key in adapter.metadata]
    names = [name for name in adapter.raws if not is_text_encoder(name)]  # those say "transformer." of another
    found += [trainer for part, trainer in _IN_NAMES.items() if any(part in name for name in names)]
    return found[0] if found else "unknown"


def lines(found: Description) -> list[str]:
    """For people."""
    ranks = ", ".join(f"{rank} on {count}" for rank, count in sorted(found.ranks.items()))
    scales = ", ".join(f"{scale:g} on {count}" for scale, count in sorted(found.scales.items()))
    total, of_kinds = counted(found.modules + len(found.unknown), "module"), found.kinds
    said = [
        f"{found.name}: {', '.join(of_kinds)} for {found.model}, {format_gb(found.bytes)} in {' '.join(found.dtypes)}",
        f"    written by     {found.trainer}",
        f"    trained on     {found.base or 'not said'}",
        f"    changes        {found.modules} of {total}: {', '.join(f'{n} by {kind}' for kind, n in of_kinds.items())}",
    ]
    said += [f"    ranks          {ranks}", f"    alpha / rank   {scales}"] if ranks else []
    if found.unused:
        said.append(f"    left out       {counted(len(found.unused), 'tensor')}: {', '.join(found.unused[:3])}")
    return said
