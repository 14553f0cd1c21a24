"""Causal softmax attention by the kernels that JAX ships: see README.md."""

from pallas_kernels.attention.api import attention as attention
from pallas_kernels.attention.api import implementation_of as implementation_of
from pallas_kernels.attention.reference import attend as attend
