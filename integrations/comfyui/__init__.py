"""zimage-lite's nodes, as ComfyUI finds them. What they are stands in README.md beside this file."""


async def comfy_entrypoint():
    from .nodes.installed import require_zimage_lite

    require_zimage_lite()
    from .nodes.extension import Extension

    return Extension()
