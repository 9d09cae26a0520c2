"""What may be said of a picture more than once: LoRAs and ControlNets, each node adding one to those before it."""

from __future__ import annotations

from comfy_api.latest import io
from torch import Tensor

from zimage_lite.config import CONTROL_SOURCES, MAX_LORA_STRENGTH, ControlUse, Lora

from . import places

Loras = io.Custom("ZIMAGE_LITE_LORAS")  # a tuple of Lora
Controls = io.Custom("ZIMAGE_LITE_CONTROLS")  # a tuple of (ControlUse, its picture, what is made of it first)


class AddLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        limit = float(MAX_LORA_STRENGTH)
        return io.Schema(
            node_id="ZImageLiteAddLora",
            display_name="Add LoRA (zimage-lite)",
            category="zimage-lite",
            description="LoRA, LoHa, LoKr, DoRA or OFT of any trainer, for Generate, on weights of any format.",
            inputs=[
                io.Combo.Input("lora", places.files("lora")),
                io.Float.Input("strength", default=1.0, min=-limit, max=limit, step=0.05),
                Loras.Input("loras", optional=True, tooltip="Those that it comes on top of."),
            ],
            outputs=[Loras.Output("loras")],
        )

    @classmethod
    def execute(cls, lora: str, strength: float, loras: tuple[Lora, ...] = ()) -> io.NodeOutput:
        return io.NodeOutput((*loras, Lora(str(places.file("lora", lora)), strength)))


class AddControl(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ZImageLiteAddControl",
            display_name="Add ControlNet (zimage-lite)",
            category="zimage-lite",
            description="A Fun Union ControlNet and the picture that it follows, for Generate.",
            inputs=[
                io.Combo.Input("control", places.files("control")),
                io.Image.Input("image"),
                io.Float.Input(
                    "scale", default=-1.0, min=-1.0, max=10.0, step=0.05, tooltip="-1: what its authors draw with."
                ),
                io.Combo.Input(
                    "made_of", list(CONTROL_SOURCES), tooltip="map: the picture is a map already; else it is made."
                ),
                Controls.Input("controls", optional=True, tooltip="Those that it comes on top of."),
            ],
            outputs=[Controls.Output("controls")],
        )

    @classmethod
    def execute(
        cls, control: str, image: Tensor, scale: float, made_of: str, controls: tuple[object, ...] = ()
    ) -> io.NodeOutput:
        use = ControlUse(str(places.file("control", control)), None if scale < 0 else scale)
        return io.NodeOutput((*controls, (use, image[0], made_of)))
