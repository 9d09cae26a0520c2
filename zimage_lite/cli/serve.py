"""zimage-lite serve"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import click

from ..checkpoint.model_card import DEMO
from ..config import BACKENDS, COMPUTES, DEVICES, DTYPES, RuntimeOptions
from ..errors import UserError
from ..serve.options import Limits, ServeOptions
from ..units import ceiling, counted
from ..workers.places import Workers
from . import leaving_at_once, say

KEY_VARIABLE = "ZIMAGE_LITE_API_KEY"
_PATH = click.Path(path_type=Path)
_NEEDED = ("starlette", "uvicorn", "python_multipart")


@click.command(name="serve")
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="[NAME=]MODEL",
    help="What --model of generate takes; once for each that clients may choose, the first one by default.  "
    "[default: demo]",
)
@click.option("--control", "controls", multiple=True, metavar="[NAME=]FILE", help="ControlNet that clients may use.")
@click.option("--lora-dir", type=_PATH, metavar="FOLDER", help="LoRAs that clients may use, by name.")
@click.option("--folder", type=_PATH, help="Of the history and its pictures.  [default: the user's data folder]")
@click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen. Elsewhere a key is required.")
@click.option("--port", type=int, default=7860, show_default=True, help="0 takes a free one.")
@click.option(
    "--api-key",
    metavar="KEY",
    help=f"What clients have to send, as Bearer or as Basic's password; better named in {KEY_VARIABLE}, which other "
    "programs do not see.",
)
@click.option("--no-auth", is_flag=True, help="Whoever reaches the server may use it, also from other machines.")
@click.option("--allow-host", "hosts", multiple=True, metavar="NAME", help="Another name that the server is called by.")
@click.option("--idle-minutes", type=float, default=10.0, show_default=True, help="After these memory is given back.")
@click.option("--queue", type=int, default=16, show_default=True, help="Jobs that may wait.")
@click.option(
    "--obey",
    is_flag=True,
    help="Take steps and cfg of A1111's clients as they are. Else a distilled model keeps to its own: they send 20 to "
    "50 steps and a cfg of 7 unasked.",
)
@click.option("--no-browser", is_flag=True, help="Do not open the page in the browser.")
@click.option(
    "--workers",
    metavar="WHERE",
    help="Draw several jobs at once, each in a process of its own: a number, gpus (one on each GPU of this machine), "
    "or ray://HOST[:PORT][/NUMBER] (one on each GPU of a Ray cluster). Needs the extra ray. --vram and --ram hold for "
    "each.",
)
@click.option("--vram", metavar="SIZE", help="Ceiling for the GPU's memory, such as 6GB.  [default: what is free]")
@click.option("--ram", metavar="SIZE", help="Ceiling for the process's memory, such as 8GB.  [default: what is free]")
@click.option("--device", type=click.Choice(DEVICES), default="auto", show_default=True)
@click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True)
@click.option("--backend", type=click.Choice(BACKENDS), default="auto", show_default=True)
@click.option("--compute", type=click.Choice(COMPUTES), default="auto", show_default=True)
@click.option("--no-cache", is_flag=True, help="Keep no embeddings of prompts on the disk.")
def command(
    models: tuple[str, ...], controls: tuple[str, ...], lora_dir: Path | None, folder: Path | None, host: str,
    port: int, api_key: str | None, no_auth: bool, hosts: tuple[str, ...], idle_minutes: float, queue: int, obey: bool,
    no_browser: bool, vram: str | None, ram: str | None, device: str, dtype: str, backend: str, compute: str,
    no_cache: bool, workers: str | None,
) -> None:  # fmt: skip
    """A page to draw with, and for other programs an API of our own, OpenAI's for images, and A1111's.

    Needs the extra `serve`: pip install "zimage-lite[serve]".
    """
    _require_extra()
    sizes = ceiling(vram), ceiling(ram)
    runtime = RuntimeOptions(device, dtype, backend, *sizes, cache=not no_cache, compute=compute)
    key, limits = api_key or os.environ.get(KEY_VARIABLE) or None, Limits(waiting=queue)
    options = ServeOptions(
        folder or _data_folder(), _named(models or (DEMO,)), runtime, lora_dir, host, port, key, no_auth, hosts,
        idle_minutes, obey, limits, _named(controls, "--control"),
    )  # fmt: skip
    where = Workers.of(workers) if workers else None
    with leaving_at_once():
        from ..serve.running import run
    if where is None:
        return run(options, say, not no_browser)
    from ..workers.cluster import hired

    with hired(where, runtime) as drawers:
        say(f"{counted(len(drawers), 'worker')} by Ray")
        run(options, say, not no_browser, drawers)


def _require_extra() -> None:
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise UserError(f"serve needs {', '.join(missing)}", fix='pip install "zimage-lite[serve]"')


def _named(given: tuple[str, ...], flag: str = "--model") -> dict[str, str]:
    """Name -> what it stands for. Without one it is what the path ends in."""
    found: dict[str, str] = {}
    for text in given:
        name, equals, place = text.partition("=")
        place = place if equals else text
        name = name if equals else place if place.startswith("synthetic:") else _last(place)
        if not name or not place or name in found:
            fix = "name each differently, as NAME=PLACE"
            raise UserError(flag, got=repr(text), expected="something with a name of its own", fix=fix)
        found[name] = place
    return found


def _last(place: str) -> str:
    """Of a path, without the ending of a file: folders have dots in their names, too."""
    path = Path(place)
    return path.stem if path.suffix in (".safetensors", ".sft", ".gguf") else path.name


def _data_folder() -> Path:
    import platformdirs

    return Path(platformdirs.user_data_dir("zimage-lite", appauthor=False)) / "serve"
