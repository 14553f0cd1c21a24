"""A .npy file that grows: what `np.save` writes, without the array in memory."""

from pathlib import Path

import numpy as np
from numpy.lib import format as npy


class NpyWriter:
    """Writes a 1-D array of `dtype` piece by piece; its length is that so far.

    A context manager. The header has room for any length, so that it can be written
    again at the end.
    """

    def __init__(self, path: Path, dtype):
        self._dtype = np.dtype(dtype)
        self._file = open(path, "wb")
        self._length = 0
        self._write_header()

    def __len__(self) -> int:
        return self._length

    def append(self, values: np.ndarray) -> None:
        """Write `values`, converted to the dtype, behind what is there."""
        values = np.asarray(values, self._dtype)
        self._file.write(values.data)
        self._length += len(values)

    def __enter__(self) -> "NpyWriter":
        return self

    def __exit__(self, *_) -> None:
        with self._file:
            self._file.seek(0)
            self._write_header()

    def _write_header(self) -> None:
        descr = npy.dtype_to_descr(self._dtype)
        header = {"descr": descr, "fortran_order": False, "shape": (self._length,)}
        npy.write_array_header_1_0(self._file, header)
