"""A tiny experiment, and runs of it that compile once and let things happen."""

import dataclasses
import functools
import random
from pathlib import Path

import jax
import numpy as np

from miras_jax import variants
from miras_jax.nn.functional import FunctionalModel
from miras_jax.nn.miras import Miras
from miras_jax.nn.model import Model
from miras_jax.training.config import Experiment, Guard
from miras_jax.training.data import TextFiles
from miras_jax.training.optimizer import AdamW
from miras_jax.training.run import Run
from miras_jax.training.tokenizer import Bytes

RULE = dataclasses.replace(variants.titans(), chunk_size=8)


def tiny(folder: Path, **changes) -> Experiment:
    """Twelve steps of a small Titans on made-up text, which is written to `folder`.

    An evaluation reads two batches, of which the last is not full.
    """
    words, rng = ["the", "cat", "sat", "on", "a", "mat"], random.Random(0)
    for name, count in (("train", 1500), ("heldout", 90)):
        text = " ".join(rng.choice(words) for _ in range(count))
        (folder / f"{name}.txt").write_text(text)
    experiment = Experiment(
        model=Model(width=32, depth=2, mixers=(Miras(RULE, num_heads=2),)),
        data=TextFiles(
            (str(folder / "train.txt"),), (str(folder / "heldout.txt"),), 32, Bytes()
        ),
        optimizer=AdamW(warmup_steps=4),
        steps=12,
        batch_size=8,
        evaluate_every=6,
        checkpoint_every=4,
        guard=Guard(limit=3),
    )
    return dataclasses.replace(experiment, **changes)


def one_device() -> jax.sharding.Mesh:
    device = np.array(jax.devices()[:1]).reshape(1, 1, 1)
    return jax.sharding.Mesh(device, ("data", "fsdp", "model"))


@functools.cache
def compiled(experiment: Experiment) -> dict:
    """What runs of equal models share, so that each program is compiled once."""
    run = Run(experiment, "nowhere")
    run.mesh = one_device()
    run.model = FunctionalModel(experiment.model, Bytes().train([]).vocab_size)
    state = jax.tree.map(np.asarray, run.initial_state())
    names = ("mesh", "model", "abstract_state", "state_shardings", "carry_sharding")
    steps = {"the_step": run.train_step, "the_evaluation": run.evaluate_step}
    return {name: getattr(run, name) for name in names} | steps | {"fresh": state}


class SharedRun(Run):
    """A run on one device, in which a test can let something happen.

    `events` maps ("step", 3), ("evaluation", 1) or ("start", 0) to what happens just
    before that, counted from 1 in this process. It returns None, or what takes the
    place of the tokens of a step or of the stop flags of an evaluation.
    """

    events = {}

    def __init__(self, experiment, workdir):
        super().__init__(experiment, workdir)
        plain = dataclasses.replace(
            experiment,
            data=TextFiles((), (), 32, Bytes()),
            evaluate_every=1,
            checkpoint_every=1,
        )
        self.__dict__.update(compiled(plain))
        self.counts = {"step": 0, "evaluation": 0}

    def happen(self, kind, array):
        self.counts[kind] += 1
        event = self.events.get((kind, self.counts[kind]), lambda: None)
        replaced = event()
        # As the loop would put it: placed otherwise, it would be compiled for anew.
        return array if replaced is None else jax.device_put(replaced, array.sharding)

    def initial_state(self):
        self.events.get(("start", 0), lambda: None)()
        return jax.device_put(self.fresh, self.state_shardings)

    def train_step(self, state, tokens, stop):
        return self.the_step(state, self.happen("step", tokens), stop)

    def evaluate_step(self, parameters, carry, tokens, weights, stop):
        stop = self.happen("evaluation", stop)
        return self.the_evaluation(parameters, carry, tokens, weights, stop)


def bits(tree) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def bad_batch():
    """Tokens beyond the vocabulary, whose loss is NaN."""
    return np.full((8, 33), 10**6, np.int32)
