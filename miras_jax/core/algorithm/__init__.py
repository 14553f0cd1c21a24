"""Learning algorithms: how the inner step is taken from the inner gradient.

An algorithm turns u_s = -learn_s g_s into the step that enters the dual recurrence. It
is written twice, in the same few symbols: token by token (`step`, the definition) and
for a block of tokens (`flow`, as coefficients of the linear recurrences). One that
`settles` adds nothing inside a chunk and takes its step where the chunk ends.
"""

from miras_jax.core.algorithm.descent import Algorithm as Algorithm
from miras_jax.core.algorithm.descent import Descent as Descent
from miras_jax.core.algorithm.descent import EraseWrite as EraseWrite
from miras_jax.core.algorithm.descent import GradientDescent as GradientDescent
from miras_jax.core.algorithm.descent import Implicit as Implicit
from miras_jax.core.algorithm.descent import Momentum as Momentum
from miras_jax.core.algorithm.descent import NonParametric as NonParametric
from miras_jax.core.algorithm.muon import Muon as Muon
from miras_jax.core.algorithm.newton import Newton as Newton
from miras_jax.core.algorithm.omega import Omega as Omega
