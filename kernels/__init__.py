"""Fast array operations. Each folder: the contract, the definition, the fast forms.

Import the operations from here: `from kernels import linear_scan`.
"""

from kernels.cauchy import cauchy, dplr_filter
from kernels.chunked_scan import chunked_scan
from kernels.dispatch import backend_report, exclude, prefer
from kernels.fft_conv import block_sizes, butterfly_conv, dft_factors, fft_conv
from kernels.linear_scan import contracted_scan, linear_scan
from kernels.selective_scan import selective_scan
from kernels.short_conv import short_conv
from kernels.vandermonde import vandermonde, vandermonde_transpose

__all__ = [
    "backend_report",
    "block_sizes",
    "butterfly_conv",
    "cauchy",
    "chunked_scan",
    "contracted_scan",
    "dft_factors",
    "dplr_filter",
    "exclude",
    "fft_conv",
    "linear_scan",
    "prefer",
    "selective_scan",
    "short_conv",
    "vandermonde",
    "vandermonde_transpose",
]
