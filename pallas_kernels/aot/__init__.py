"""What kernels compile to, for chips that one need not own.

`python -m pallas_kernels.aot tpu` prints a table; `Case` is what it makes a row of. All
figures are facts of compiled programs, not measurements of time.
"""

from pallas_kernels.aot.case import Case as Case
from pallas_kernels.aot.case import work as work
