"""Which files hold a component's weights: one, or the shards that an index, or else their own names, tell of.

A shard alone is never taken for the whole. Of several precisions of the same weights the plain one is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import FileFormatError, UserError, WrongModelError
from .impostors import refuse_cache_root
from .json_file import read_json

WEIGHT_SUFFIXES = (".safetensors", ".gguf", ".sft")
ADAPTER_CONFIG = "adapter_config.json"  # of PEFT, beside an adapter's weights

# diffusers' "fp16" stands before or after the number of a shard, and before or after ".safetensors.index".
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<end>\..+)")
_INDEX = re.compile(r"[^.]+(?P<before>\.[\w-]+)?\.safetensors\.index(?P<after>\.[\w-]+)?\.json")


@dataclass(frozen=True)
class WeightSet:
    """Files that belong together. is_variant: of another precision than the plain files beside them."""

    files: tuple[Path, ...]
    is_variant: bool
    index: Path | None = None

    @property
    def missing(self) -> list[Path]:
        return [file for file in self.files if not file.exists()]

    @property
    def name(self) -> str:
        return (self.index or self.files[0]).name


def is_weight_file(path: Path) -> bool:
    ours = not path.name.startswith(".")  # macOS leaves ._x.safetensors about
    return ours and path.suffix.lower() in WEIGHT_SUFFIXES


def weight_set(folder: Path) -> WeightSet:
    """The weights of a component folder. Raises UserError unless one whole set of them is there."""
    found = list(_sets(folder))
    whole = [one for one in found if not one.missing]
    if found and not whole:
        raise UserError(f"{found[0].missing[0]}: this shard is missing", fix="download the folder again")
    if not found:
        refuse_cache_root(folder)
    plain = [one for one in whole if not one.is_variant] or whole
    chosen = [one for one in plain if one.index] or plain
    if len(chosen) != 1:
        raise UserError(
            f"{folder}",
            got=", ".join(one.name for one in chosen) or "no weights",
            expected="one .safetensors or .gguf file, or all shards of one",
        )
    return chosen[0]


def require_whole(file: Path) -> None:
    """Raise WrongModelError if a file named alone is one of several shards. Those of GGUF say so in their headers."""
    named, which = _SHARD.fullmatch(file.name), ""
    if file.suffix == ".gguf":
        return
    if named and int(named["count"]) > 1:
        which = f"part {int(named['number'])} of {int(named['count'])}"
    with suppress(UserError):  # an index that is broken says nothing
        for one in _indexed(file.parent):
            if file in one.files and len(one.files) > 1:
                which = which or f"one of the {len(one.files)} parts in {one.name}"
    if which:
        fix = "name the folder that holds all of them"
        raise WrongModelError(f"{file}: this is {which} of a sharded file", fix=fix)


def are_shards(files: Iterable[Path]) -> bool:
    """Whether the files' names say that they are parts of the same one."""
    return len({_group(file) for file in files} - {None}) == 1 and all(map(_group, files))


def _sets(folder: Path) -> Iterator[WeightSet]:
    """Those of an index first, then shards without one, then single files."""
    taken: set[Path] = set()
    for one in dict.fromkeys(_indexed(folder)):
        yield one
        taken |= set(one.files)
    groups: dict[tuple[str, str, str] | None, list[Path]] = {}
    for file in sorted(filter(is_weight_file, folder.iterdir())):
        if file not in taken:
            groups.setdefault(_group(file), []).append(file)
    single = groups.pop(None, [])
    for stem, count, end in filter(None, groups):
        names = [f"{stem}-{n:05d}-of-{count}{end}" for n in range(1, int(count) + 1)]
        yield WeightSet(tuple(folder / name for name in names), "." in stem or end.count(".") > 1)
    for file in single:
        yield WeightSet((file,), "." in file.stem)


def _group(file: Path) -> tuple[str, str, str] | None:
    """What all shards of one file have in their names."""
    match = _SHARD.fullmatch(file.name)
    return (match["stem"], match["count"], match["end"]) if match else None


def _indexed(folder: Path) -> Iterator[WeightSet]:
    for index in sorted(folder.glob("*.safetensors.index*.json")):
        spelled = _INDEX.fullmatch(index.name)
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise FileFormatError(f"{index}: weight_map is not a map of file names")
        files = tuple(folder / Path(shard).name for shard in sorted(set(weight_map.values())))
        if spelled and files:
            yield WeightSet(files, bool(spelled["before"] or spelled["after"]), index)
