"""The ControlNets of a request, opened and not loaded, and how their weights stand beside the transformer's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.container import file_stamp
from ..checkpoint.controlnets import Settings, names_of, require_goes_with, said_of, settings
from ..checkpoint.detect import CONTROLNET
from ..checkpoint.hashes import sha256_of
from ..checkpoint.hub import named_file
from ..checkpoint.model_card import control_name, control_place
from ..config import ControlConfig, ControlUse, GenerateOptions, TransformerConfig
from ..convert.catalog import stored_parts
from ..convert.complete import open_complete
from ..convert.synthetic import PREFIX, is_synthetic, open_synthetic_control
from ..model.controlnet import CONTROLS, unrolled, unrolled_weights
from ..model.samplers import asked_at
from ..plan.job import ControlSizes
from .levels import is_within


@dataclass(frozen=True)
class OpenControl:
    """A ControlNet's file, or folder, and how its authors draw with it."""

    name: str
    checkpoint: Checkpoint
    settings: Settings

    @cached_property
    def config(self) -> ControlConfig:
        """As it is drawn with."""
        return unrolled(self.checkpoint.config)

    def sizes(self, copies: bool) -> ControlSizes:
        """copies: see `ControlSizes`."""
        parts = {part.name: part for part in stored_parts(self.checkpoint)}
        found = unrolled_weights(self.checkpoint.config, parts)
        return ControlSizes(self.config, tuple(replace(part, name=name) for name, part in found.items()), copies)

    @property
    def is_as_opened(self) -> bool:
        """Whether its files are still those that were opened."""
        return all(file_stamp(file) == stamp for file, stamp in self.checkpoint.stamps.items())

    @cached_property
    def sha256(self) -> str | None:
        """Of its file, or of all of a folder's weights one after another, by which model sites know it; None if it was
        made in memory, or its files are others by now. Reads it all, once: 1 to 2 GB a second."""
        try:
            found = sha256_of(*sorted(self.checkpoint.stamps)) if self.checkpoint.stamps else None
        except OSError:
            return None
        return found if self.is_as_opened else None


@dataclass(frozen=True)
class ControlSet:
    """ControlNets that are asked together. scales: of each; start, end: parts of the steps between which they are;
    copies: by diffusers' mathematics."""

    nets: tuple[OpenControl, ...] = field(default=(), compare=False)
    uses: tuple[ControlUse, ...] = ()
    start: float = 0.0
    end: float = 1.0
    copies: bool = False

    def __bool__(self) -> bool:
        return bool(self.nets)

    @property
    def scales(self) -> list[float]:
        pairs = zip(self.uses, self.nets, strict=True)
        return [net.settings.scale if use.scale is None else use.scale for use, net in pairs]

    @property
    def sizes(self) -> tuple[ControlSizes, ...]:
        return tuple(net.sizes(self.copies) for net in self.nets)

    def runs(self, step: int, steps: int) -> bool:
        """Whether they are asked in this step."""
        return bool(self.nets) and is_within(step, steps, self.start, self.end)

    def asked(self, sampler: str, sigmas: Tensor, tiles: int) -> tuple[bool, ...]:
        """Of each pass over the model for an image, whether they run in it."""
        steps = len(sigmas) - 1
        return tuple(self.runs(step, steps) for step in asked_at(sampler, sigmas) for _ in range(tiles))

    def only(self, places: Sequence[int]) -> ControlSet:
        """Those at these places."""
        nets, uses = tuple(self.nets[place] for place in places), tuple(self.uses[place] for place in places)
        return replace(self, nets=nets, uses=uses)

    def joined(self, transformer: Checkpoint) -> Checkpoint:
        """With the transformer's weights, by the names of a `ControlledTransformer`."""
        tensors = dict(transformer.tensors)
        for i, net in enumerate(self.nets):
            own = unrolled_weights(net.checkpoint.config, net.checkpoint.tensors)
            tensors |= {f"{CONTROLS}.{i}.{name}": tensor for name, tensor in own.items()}
        return replace(transformer, tensors=tensors)


UNCONTROLLED = ControlSet()


def open_control(path: str) -> Checkpoint:
    """A ControlNet's file or folder, OWNER/NAME[/FILE] of the Hub, "demo", or "synthetic:VERSION/FORMAT". Raises
    UserError."""
    if is_synthetic(path) or path == PREFIX[:-1]:  # "synthetic:2.1" was taken for a scale
        return open_synthetic_control(path)
    return open_complete(named_file(path) or control_place(path), CONTROLNET)


class ControlLibrary:
    """The ControlNets that a pipeline has met: opened once, and again when their files change. config: of the
    transformer that they are for. tell: takes a line for each: what it is."""

    def __init__(self, config: TransformerConfig, tell: Callable[[str], None]) -> None:
        self.config, self.tell = config, tell
        self._open: dict[str, OpenControl] = {}

    def of(self, request: GenerateOptions) -> ControlSet:
        """Raises UserError for what is no ControlNet, or is one of another model."""
        copies = request.control_math == "diffusers"
        return self.of_uses(request.controls, request.control_start, request.control_end, copies)

    def of_uses(
        self, uses: tuple[ControlUse, ...], start: float = 0.0, end: float = 1.0, copies: bool = False
    ) -> ControlSet:
        """As fields of `ControlSet`. Raises UserError."""
        if not uses:
            return UNCONTROLLED
        return ControlSet(tuple(self._opened(use.path) for use in uses), uses, start, end, copies)

    def told(self, request: GenerateOptions) -> list[dict[str, Any]]:
        """As plain data, for recipes: those that were opened last, whatever became of their files."""
        nets = [self._open.get(use.path) or self._opened(use.path) for use in request.controls]
        controls = ControlSet(tuple(nets), request.controls)
        pairs = zip(controls.nets, controls.scales, strict=True)
        found = [{"name": net.name, "scale": scale, "sha256": net.sha256} for net, scale in pairs]
        return [{name: value for name, value in one.items() if value is not None} for one in found]

    def _opened(self, path: str) -> OpenControl:
        known = self._open.get(path)
        if known is None or not known.is_as_opened:
            checkpoint, name = open_control(path), control_name(path)
            require_goes_with(checkpoint.config, self.config, path)
            known = OpenControl(name, checkpoint, settings(checkpoint.config, names_of(checkpoint)))
            self._open[path] = known
            self.tell(f"{name}: {said_of(checkpoint.config, names_of(checkpoint))}")
        return known


def unusual(request: GenerateOptions, controls: ControlSet, steps: int, undistilled: bool) -> list[str]:
    """Lines on what of a complete request is not as the authors of its ControlNets draw. steps: that are drawn;
    undistilled: with Z-Image Base."""
    found = []
    if controls and not any(controls.runs(step, steps) for step in range(steps)):
        parts = f"--control-start {controls.start:g} and --control-end {controls.end:g}"
        found.append(f"none of {steps} steps begins between {parts}, so no ControlNet is asked")
    for net, scale in zip(controls.nets, controls.scales, strict=True):
        low, high = net.settings.scales
        if scale and not low <= scale <= high:
            found.append(f"{net.name}: its authors draw at a scale of {low:.2f} to {high:.2f}, not {scale:g}")
        if request.step_count < net.settings.steps:
            found.append(
                f"{net.name}: by its name made for {net.settings.steps} steps; {request.step_count} may be blurred"
            )
        if net.settings.base != undistilled:
            model, other = ("Base", "Turbo") if net.settings.base else ("Turbo", "Base")
            found.append(f"{net.name}: by its name made for Z-Image {model}, and this is {other}")
    return found
