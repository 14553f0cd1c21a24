"""A trace of some steps of training: what takes how long, on host and devices."""

from pathlib import Path
from typing import Any

import jax

from miras_jax.errors import UserError


class Profile:
    """Traces the steps from a first to a last one into a folder, for xprof; None: none.

    Steps count from 1, over all that a run has taken; one that continues behind them
    traces nothing. Compilation is in the trace of a run's first step.
    """

    def __init__(self, folder: str | Path, steps: tuple[int, int] | None):
        self._folder = str(folder)
        self._first, self._last = steps or (None, None)
        self._is_tracing = False
        if steps and not 1 <= self._first <= self._last:
            raise UserError(
                f"steps {self._first} to {self._last} cannot be traced; give the first "
                "and the last one, counted from 1"
            )

    def begin(self, step: int) -> None:
        """To be called before a step."""
        if step == self._first:
            jax.profiler.start_trace(self._folder)
            self._is_tracing = True

    def end(self, step: int, results: Any) -> None:
        """To be called behind it, with what to wait for."""
        if self._is_tracing and step == self._last:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        """Write what was traced, if a run ends before the last step to trace."""
        if self._is_tracing:
            self._is_tracing = False
            jax.profiler.stop_trace()
