"""`fused_scan`: a scan of a pure step over the chunks of a sequence."""

from pallas_kernels.fused_scan.api import fused_scan as fused_scan
from pallas_kernels.fused_scan.api import platform as platform
from pallas_kernels.fused_scan.api import target as target
from pallas_kernels.fused_scan.autodiff import Unsupported as Unsupported
from pallas_kernels.fused_scan.partition import devices_along as devices_along
from pallas_kernels.fused_scan.partition import split_over as split_over
