"""The small language model of the studies: the quickstart's data, minutes a run."""

import dataclasses
from pathlib import Path

from experiments.quickstart import experiment as quickstart
from miras_jax.nn.model import Mixer
from miras_jax.training.config import Experiment
from miras_jax.training.train import Diverged, Result, train

WIDTH, HEADS, CONTEXT, CHUNK = 96, 3, 128, 16


def experiment(
    mixers: tuple[Mixer, ...], *, steps: int, seed: int = 0, evaluate_every: int
) -> Experiment:
    """The quickstart at width 96 and contexts of 128, two blocks or one per mixer."""
    base = quickstart()
    depth = 2 if len(mixers) == 1 else len(mixers)
    model = dataclasses.replace(base.model, width=WIDTH, depth=depth, mixers=mixers)
    return dataclasses.replace(
        base,
        model=model,
        data=dataclasses.replace(base.data, context_length=CONTEXT),
        steps=steps,
        seed=seed,
        evaluate_every=evaluate_every,
        evaluate_windows=128,
        checkpoint_every=steps,
    )


def trained(wanted: Experiment, workdir: Path) -> Result | None:
    """Train to the last step; None if that diverged.

    A run that was asked to stop before ends the command, which goes on from there when
    it is given again.
    """
    try:
        result = train(wanted, workdir)
    except Diverged as error:
        print(error)
        return None
    if not result.finished:
        raise SystemExit(
            f"stopped after step {result.step} of {wanted.steps} in {workdir}; the "
            "same command goes on from there"
        )
    return result
