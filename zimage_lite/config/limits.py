"""Numbers and names that hold everywhere."""

from __future__ import annotations

SEQUENCE_MULTIPLE = 32  # caption and image are each padded to this with learned pad tokens
PATCH_SIZE = 2  # latent pixels per token, each way
VAE_FACTOR = 8  # image pixels per latent pixel, each way
VAE_QUERIES = 1024  # of its attention, at a time
SIZE_MULTIPLE = VAE_FACTOR * PATCH_SIZE
TOKENS_PER_PASS = 1024  # prompts are encoded and refined together up to this many tokens
MOST_PER_ROUND = 64  # images are denoised before the first of them is decoded
MOST_REFERENCES = 3  # pictures that an Omni sees beside the prompt, as in ComfyUI's node
VISION_PATCHES = 256  # of a picture, at most, as the vision tower sees it
MAX_PROMPT_TOKENS = 512  # as diffusers truncates
DEFAULT_SIZE = 1024  # pixels each way, where the model's card names no other
# Compute capabilities on which attention beside 8-bit products adds up weights x values in float16, twice as fast on
# GeForce: those of the kernels (HALF_RATE_SUMS), for the planner, which imports no torch.
FLOAT16_SUMS = frozenset({(8, 6), (8, 9), (12, 0)})
MAX_STEPS = 1000  # as many as the model was trained with
MAX_LORA_STRENGTH = 100  # as ComfyUI has it
TILED_PIXELS = 2048 * 2048  # above, a picture that is drawn over is denoised in tiles: as much as the card names
PREVIEW_BYTES = 150 * 10**6  # of RAM for previews by TAEF1 of 256 pixels: 116 MB more were measured (AVX2)
REPAIR_RANK = 32  # of what is written beside a quantized transformer: 0.25 bits for each of the true model's weights
DEFAULT_STRENGTH = 0.6  # of drawing a picture over; of what a mask names, 1
RANDOM_SEED = -1  # stands for one that is drawn

DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = ("auto", "bf16", "fp16", "fp32")
BACKENDS = ("auto", "triton", "reference")
COMPUTES = ("auto", "int8", "16bit")
# Rows of the tables in model/samplers.py and model/schedules.py, for those who import no torch.
SAMPLERS = (
    "euler", "heun", "res_multistep", "dpmpp_2m", "euler_ancestral", "lcm", "dpmpp_2m_sde", "er_sde",
)  # fmt: skip
SCHEDULES = (
    "simple", "normal", "sgm_uniform", "beta", "beta57", "bong_tangent", "linear_quadratic", "kl_optimal", "karras",
)  # fmt: skip
STRENGTH_MODES = ("steps", "diffusers")
NO_MASK = "none"  # in the place of one: what is transparent is no mask, either
REFERENCE_POSITIONS = ("diffusers", "aligned")
FITS = ("crop", "pad", "stretch")
INPAINT_AREAS = ("picture", "mask")
CONTROL_MATHS = ("authors", "diffusers")
CONTROL_SOURCES = ("map", "canny", "scribble", "grey", "tile")  # a map as it is; the others are made of a picture
INFINITE = 1e30  # no setting is this large; also refuses NaN, which compares with nothing
