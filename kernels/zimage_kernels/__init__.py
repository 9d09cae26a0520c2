"""The operations that Z-Image spends its time in, one file per op, each defined by a few lines of torch.

The torch reference is the definition, the fallback and the test oracle. Triton kernels join it op by op.
"""

from .attention import attention
from .linear_int8 import linear_int8, linear_int8_reference
from .norm import rms_norm
from .rope import apply_rope
from .rotation import hadamard_rotate
from .swiglu_int8 import swiglu_int8, swiglu_int8_reference

__all__ = [
    "apply_rope",
    "attention",
    "hadamard_rotate",
    "linear_int8",
    "linear_int8_reference",
    "rms_norm",
    "swiglu_int8",
    "swiglu_int8_reference",
]
