"""What only tests put into a ComfyUI."""

from pathlib import Path

import folder_paths
import torch
from safetensors.torch import save_file


class RandomConditioning:
    """As a text encoder's, so that none has to be there."""

    CATEGORY, FUNCTION, RETURN_TYPES = "tests", "make", ("CONDITIONING",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"tokens": ("INT", {"default": 40}), "width": ("INT", {"default": 2560}), "seed": ("INT",)}}

    def make(self, tokens, width, seed):
        made = torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(seed))
        return ([[made, {}]],)


class PatchedBlocks:
    """As ControlNets of ComfyUI do: reaches into every block."""

    CATEGORY, FUNCTION, RETURN_TYPES = "tests", "patch", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    def patch(self, model):
        patched = model.clone()
        patched.set_model_double_block_patch(lambda given: {})
        return (patched,)


class SaveConditioning:
    """To a file of that name among the outputs."""

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "tests", "save", (), True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"conditioning": ("CONDITIONING",), "name": ("STRING",)}}

    def save(self, conditioning, name):
        made = {"conditioning": conditioning[0][0].float().contiguous()}
        folder = Path(folder_paths.get_output_directory())
        folder.mkdir(exist_ok=True)  # ComfyUI makes it with its first picture
        save_file(made, folder / name)
        return {}


NODE_CLASS_MAPPINGS = {
    "TestRandomConditioning": RandomConditioning,
    "TestPatchedBlocks": PatchedBlocks,
    "TestSaveConditioning": SaveConditioning,
}
