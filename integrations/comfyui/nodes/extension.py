"""The list of nodes."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import places
from .generate import Generate
from .loading import LoadEncoder, LoadModel, LoadVae
from .more import AddControl, AddLora
from .quantize import Quantize

NODES: list[type[io.ComfyNode]] = [Generate, AddLora, AddControl, LoadModel, LoadEncoder, LoadVae, Quantize]


class Extension(ComfyExtension):
    async def on_load(self) -> None:
        places.register()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES
