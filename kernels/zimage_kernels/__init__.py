"""The operations that Z-Image spends its time in, one file per op, each defined by a few lines of torch.

The torch reference is the definition, the fallback and the test oracle. Triton kernels join it op by op.
"""

from .attention import attention
from .norm import rms_norm
from .rope import apply_rope
from .rotation import hadamard_rotate

__all__ = ["apply_rope", "attention", "hadamard_rotate", "rms_norm"]
