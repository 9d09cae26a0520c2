"""/sdapi/v1/..., as A1111 and Forge have it: for Open WebUI, SillyTavern, LibreChat and others who ask like them."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Mapping
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ..pictures.infotext import SAMPLER_LABELS, SCHEDULE_LABELS
from ..pictures.saving import infotext_of, recipe_of
from .a1111_fields import translated
from .failures import failure, of_job
from .fields import FieldError, asked_for
from .jobs import Job
from .service import Service
from .uploads import picture_of
from .waiting import json_of, over

CLIENT = "a1111"
# What is asked for and has nothing to say here.
_EMPTY: dict[str, Any] = {
    "sd-vae": [], "sd-modules": [], "hypernetworks": [], "face-restorers": [], "realesrgan-models": [],
    "prompt-styles": [], "scripts": {"txt2img": [], "img2img": []}, "script-info": [], "extensions": [],
    "embeddings": {"loaded": {}, "skipped": {}}, "cmd-flags": {},
    "latent-upscale-modes": [{"name": "Latent"}],
    "upscalers": [{"name": "None", "model_name": None, "model_path": None, "model_url": None, "scale": 1}],
}  # fmt: skip


class A1111Routes:
    def __init__(self, service: Service) -> None:
        self.service, self.chosen = service, service.catalog.models[0]

    def routes(self) -> list[Route]:
        posts = {
            "txt2img": self.draw, "img2img": self.draw, "interrupt": self.interrupt, "skip": self.interrupt,
            "options": self.choose, "png-info": self.png_info, "refresh-loras": self.nothing,
            "refresh-checkpoints": self.nothing, "refresh-vae": self.nothing, "unload-checkpoint": self.nothing,
            "reload-checkpoint": self.nothing,
        }  # fmt: skip
        gets = {
            "progress": self.progress, "options": self.options, "sd-models": self.models, "samplers": self.samplers,
            "schedulers": self.schedulers, "loras": self.loras, **dict.fromkeys(_EMPTY, self.empty),
        }  # fmt: skip
        return [
            *(Route(f"/sdapi/v1/{name}", handler, methods=["POST"]) for name, handler in posts.items()),
            *(Route(f"/sdapi/v1/{name}", handler, methods=["GET"]) for name, handler in gets.items()),
        ]

    async def draw(self, request: Request) -> Response:
        values, service, over_image = await json_of(request), self.service, request.url.path.endswith("img2img")
        if over_image and not values.get("init_images"):
            return failure(request.url.path, 404, "Init image not found", "not_found")
        named = values.get("override_settings")
        model = self._listed(named.get("sd_model_checkpoint") if isinstance(named, dict) else None) or self.chosen
        own, extra = await run_in_threadpool(self._translated, values, model, over_image)
        _, requests = await run_in_threadpool(asked_for, own, service.catalog, service.options.limits)
        job = await run_in_threadpool(service.submit, model, requests, CLIENT, True)
        if not await over(service.board, job, request):
            return Response(status_code=499)
        if refused := of_job(request.url.path, job):
            return refused
        return JSONResponse(await run_in_threadpool(self._answer, job, values, extra))

    def _translated(
        self, values: Mapping[str, Any], model: str, over_image: bool
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        catalog, options = self.service.catalog, self.service.options
        scheduler = None if options.obey else catalog.scheduler(model)
        own, extra = translated(values, over_image, scheduler, options.limits.picture_pixels)
        if not over_image:
            width, height = catalog.size(model)
            own = {"width": width, "height": height, **own}
        return {**own, "model": model}, extra

    def _answer(self, job: Job, values: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
        paths = [path for picture in job.pictures if (path := self.service.history.picture(picture.name))]
        shown = paths if values.get("send_images", True) else []
        echo = {name: value for name, value in values.items() if name not in ("init_images", "mask")}
        info = {**_info(job, recipe_of(paths[0])), "extra_generation_params": dict(extra)}
        info["infotexts"] = [infotext_of(path) for path in paths]
        images = [base64.b64encode(path.read_bytes()).decode() for path in shown]
        return {"images": images, "parameters": echo, "info": json.dumps(info)}

    async def progress(self, request: Request) -> Response:
        """Of the job that is drawn now, whoever ordered it."""
        board, job = self.service.board, self.service.board.running
        facts = board.facts(job) if job else None
        done, total = (facts["step"] or 0, facts["steps"] or 0) if facts else (0, 0)
        wanted = request.query_params.get("skip_current_image", "false").lower() != "true"
        if job and wanted:
            board.glance(job)
        preview = base64.b64encode(job.preview).decode() if job and job.preview and wanted else None
        waiting = board.waiting()
        state = {
            "skipped": False, "interrupted": bool(job and job.cancelled.is_set()), "stopping_generation": False,
            "job": job.id if job else "", "job_count": (1 if job else 0) + waiting,
            "job_timestamp": _stamp(job) if job else "0", "job_no": 0, "sampling_step": done, "sampling_steps": total,
        }  # fmt: skip
        return JSONResponse({
            "progress": min(done / total, 0.99) if total else 0.01 if state["job_count"] else 0.0,
            "eta_relative": (facts or {}).get("seconds_left") or 0.0, "state": state, "current_image": preview,
            "textinfo": None,
        })  # fmt: skip

    async def interrupt(self, request: Request) -> Response:
        """What was ordered here and is drawn now: not what a page or another client waits for."""
        for job in list(self.service.board.all_running):
            if job.client == CLIENT:
                self.service.board.cancel(job)
        return JSONResponse({})

    async def options(self, request: Request) -> Response:
        return JSONResponse({
            "sd_model_checkpoint": self.chosen, "sd_checkpoint_hash": "", "samples_format": "png",
            "sd_vae": "Automatic", "CLIP_stop_at_last_layers": 1, "live_previews_enable": True,
        })  # fmt: skip

    async def choose(self, request: Request) -> Response:
        """Of all options only the model can be chosen, and only among those that are served."""
        named = (await json_of(request)).get("sd_model_checkpoint")
        if named is not None:
            if not (found := self._listed(named)):
                raise FieldError(f"sd_model_checkpoint: got {named!r:.60}, expected one of sd-models")
            self.chosen = found
        return JSONResponse(None)

    async def models(self, request: Request) -> Response:
        return JSONResponse([
            {"title": name, "model_name": name, "hash": None, "sha256": None, "filename": name, "config": None}
            for name in self.service.catalog.models
        ])  # fmt: skip

    async def samplers(self, request: Request) -> Response:
        labels = SAMPLER_LABELS.items()
        return JSONResponse([{"name": label, "aliases": [name], "options": {}} for name, label in labels])

    async def schedulers(self, request: Request) -> Response:
        rest = {"aliases": None, "default_rho": -1, "need_inner_model": False}
        return JSONResponse([{"name": name, "label": label, **rest} for name, label in SCHEDULE_LABELS.items()])

    async def loras(self, request: Request) -> Response:
        """By name; where they lie is the server's."""
        found = await run_in_threadpool(self.service.catalog.loras)
        return JSONResponse([{"name": name, "alias": name, "path": name, "metadata": {}} for name in sorted(found)])

    async def png_info(self, request: Request) -> Response:
        values, most = await json_of(request), self.service.options.limits.picture_pixels
        raw = await run_in_threadpool(picture_of, values.get("image"), "image", most)
        text, recipe = await run_in_threadpool(lambda: (infotext_of(raw), recipe_of(raw)))
        return JSONResponse({"info": text, "items": {"parameters": text} if text else {}, "parameters": recipe})

    async def empty(self, request: Request) -> Response:
        return JSONResponse(_EMPTY[request.url.path.rpartition("/")[2]])

    async def nothing(self, request: Request) -> Response:
        return JSONResponse(None)

    def _listed(self, named: object) -> str | None:
        """Titles come with a hash behind them from those who remember A1111's."""
        text = named.partition(" [")[0] if isinstance(named, str) else ""
        return text if text in self.service.catalog.models else None


def _stamp(job: Job) -> str:
    return time.strftime("%Y%m%d%H%M%S", time.localtime(job.created))


def _info(job: Job, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """recipe: of the first picture."""
    prompt, negative, first, count = recipe["prompt"], recipe["negative"], job.pictures[0], len(job.pictures)
    return {
        "prompt": prompt, "negative_prompt": negative, "seed": first.seed, "subseed": 0, "subseed_strength": 0,
        "all_prompts": [prompt] * count, "all_negative_prompts": [negative] * count,
        "all_seeds": [picture.seed for picture in job.pictures], "all_subseeds": [0] * count,
        "width": first.width, "height": first.height, "batch_size": count, "index_of_first_image": 0,
        "sampler_name": SAMPLER_LABELS[recipe["sampler"]], "cfg_scale": recipe["guidance"] + 1,
        "steps": recipe["steps"],
        "sd_model_name": job.model, "sd_model_hash": recipe["model"].get("sha256", "")[:10],
        "denoising_strength": recipe.get("strength"), "job_timestamp": _stamp(job), "clip_skip": 1,
        "version": recipe["version"],
    }  # fmt: skip
