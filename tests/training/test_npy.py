"""What is written piece by piece is what numpy would have written at once."""

import numpy as np
import pytest

from miras_jax.training.npy import NpyWriter


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.int64])
@pytest.mark.parametrize("lengths", [(), (0,), (3,), (5, 0, 1), (999, 99_001)])
def test_the_file_is_that_of_numpy(tmp_path, dtype, lengths):
    pieces = [np.arange(n, dtype=np.int32) for n in lengths]
    with NpyWriter(tmp_path / "grown.npy", dtype) as writer:
        for piece in pieces:
            writer.append(piece)
        assert len(writer) == sum(lengths)
    whole = np.concatenate([np.zeros(0, dtype), *pieces]).astype(dtype)
    np.save(tmp_path / "whole.npy", whole)
    expected = (tmp_path / "whole.npy").read_bytes()
    assert (tmp_path / "grown.npy").read_bytes() == expected
