"""The operations that Z-Image spends its time in, one file per op, each defined by a few lines of torch.

The torch reference is the definition, the fallback and the test oracle. Triton kernels join it op by op.
"""

from ._triton import Backend, adds_faster_in_float16, has_matrix_units, triton_obstacle, use_triton
from .attention import attention, attention_int8, attention_int8_reference, flash_attention
from .dequantize import KINDS, dequantize, requantize, unpacks
from .integer_product import cpu_int8_is_faster, integer_product, loops_obstacle
from .linear_int8 import linear_int8, linear_int8_reference
from .norm import Branch, Norm, Normed, add_norm, add_norm_reference, rms_norm
from .project_rows import project_rows, project_rows_reference
from .qk import norm_rope, norm_rope_reference
from .quantize import GROUPS, Int8Rows, quantize_rows, quantize_rows_reference
from .rope import apply_rope
from .rotation import hadamard_rotate
from .swiglu_int8 import swiglu_int8, swiglu_int8_reference

__all__ = [
    "GROUPS",
    "KINDS",
    "Backend",
    "Branch",
    "Int8Rows",
    "Norm",
    "Normed",
    "add_norm",
    "add_norm_reference",
    "adds_faster_in_float16",
    "apply_rope",
    "attention",
    "attention_int8",
    "attention_int8_reference",
    "cpu_int8_is_faster",
    "dequantize",
    "flash_attention",
    "hadamard_rotate",
    "has_matrix_units",
    "integer_product",
    "linear_int8",
    "linear_int8_reference",
    "loops_obstacle",
    "norm_rope",
    "norm_rope_reference",
    "project_rows",
    "project_rows_reference",
    "quantize_rows",
    "quantize_rows_reference",
    "requantize",
    "rms_norm",
    "swiglu_int8",
    "swiglu_int8_reference",
    "triton_obstacle",
    "unpacks",
    "use_triton",
]
