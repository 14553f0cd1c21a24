"""Trained models on the tasks of EleutherAI's lm-evaluation-harness.

This module needs the package lm_eval: pip install 'miras-jax[eval]'. What is said of a
text's likelihood is from `scoring`, what is written from `generate`.
"""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, make_table

from miras_jax.errors import UserError
from miras_jax.evaluation.scoring import Pair, Scorer
from miras_jax.export import Trained
from miras_jax.generate import complete

RESAMPLES = 1000
"""Draws for the standard errors that have no formula, such as a perplexity's."""

SETTINGS = {"until", "do_sample", "temperature", "top_p", "max_gen_toks"}
KEPT = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better")


class HarnessModel(LM):
    """A trained model as lm_eval asks it; the same requests get the same answers."""

    def __init__(self, trained: Trained, max_length: int = 2048):
        super().__init__()
        self.scorer = Scorer(trained, max_length)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Nats of each continuation after its context, and if it is greedy."""
        pairs = [self.scorer.pair(*request.args) for request in requests]
        return [tuple(score) for score in self.scorer.score(pairs)]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Nats of each whole text, in windows that each begin without a memory.

        The harness's own windows: every token is predicted once, the last window reads
        again what lets it be full.
        """
        pairs, owners = [], []
        for owner, request in enumerate(requests):
            windows = get_rolling_token_windows(
                self.scorer.encode(request.args[0]),
                prefix_token=self.scorer.trained.tokenizer.end_of_text,
                max_seq_len=self.scorer.max_length,
                context_len=1,
            )
            parts = [Pair(*make_disjoint_window(window)) for window in windows]
            pairs += parts
            owners += [owner] * len(parts)
        totals = [0.0] * len(requests)
        for owner, score in zip(owners, self.scorer.score(pairs), strict=True):
            totals[owner] += score.log_likelihood
        return totals

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """What the model writes after each context until one of its stop strings."""
        answers = [""] * len(requests)
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(repr(request.args[1]), []).append(number)
        for numbers in alike.values():
            options = _options(requests[numbers[0]].args[1])
            prompts = [requests[number].args[0] for number in numbers]
            limit = self.scorer.max_length
            texts = complete(self.scorer.trained, prompts, limit=limit, **options)
            for number, text in zip(numbers, texts, strict=True):
                answers[number] = text
        return answers


def _options(settings: dict) -> dict:
    """A task's settings of generation as those of `complete`."""
    settings = normalize_gen_kwargs(settings)
    if unknown := sorted(set(settings) - SETTINGS):
        raise UserError(
            f"a task asks for {', '.join(unknown)}, which generation here has not; it "
            f"has {', '.join(sorted(SETTINGS))}"
        )
    return {
        "length": settings["max_gen_toks"],
        # A task that has no use for an end gives an empty one.
        "stop": [stop for stop in settings["until"] if stop],
        "temperature": settings.get("temperature", 0.0),
        "top_p": settings.get("top_p", 1.0),
    }


class _Tasks(TaskManager):
    """Tasks whose data cannot be had are a mistake of the user, in one line."""

    def load(self, task_list):
        try:
            return super().load(task_list)
        except Exception as error:  # whatever the task's source raises
            names = ", ".join(map(str, task_list))
            raise UserError(
                f"one of the tasks {names} cannot be loaded ({type(error).__name__}: "
                f"{error}); most need huggingface.co the first time: go online, or "
                "use --include DIR with data of your own"
            ) from error


def evaluate(
    trained: Trained,
    tasks: Sequence[str],
    *,
    include: str | Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    max_length: int = 2048,
) -> dict:
    """What lm_eval's `simple_evaluate` tells of the model on these tasks.

    include: a folder of the user's own YAML task files; limit: examples of each task;
    num_fewshot: instead of the tasks' own. UserError: a task that is not known, or
    whose data cannot be had.
    """
    if include is not None and not Path(include).is_dir():
        raise UserError(f"{include} is no folder; give one that holds YAML task files")
    manager = _Tasks(include_path=None if include is None else str(include))
    if unknown := [name for name in tasks if not manager.match_tasks([name])]:
        raise UserError(
            f"no task {', '.join(unknown)}; 'lm-eval ls tasks' lists those of the "
            "harness, and --include DIR adds your own"
        )
    # Every attempt at a download that fails is a warning; the last one is the error.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    # It would fork a process that JAX runs in.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    return lm_eval.simple_evaluate(
        model=HarnessModel(trained, max_length),
        tasks=manager.match_tasks(list(tasks)),
        task_manager=manager,
        limit=limit,
        num_fewshot=num_fewshot,
        bootstrap_iters=RESAMPLES,
        log_samples=False,
    )


def tables(results: dict) -> str:
    """The harness's own table of the results, and that of groups if there are any."""
    parts = [make_table(results)]
    if results.get("groups"):
        parts.append(make_table(results, "groups"))
    return "\n".join(parts)


def kept(results: dict) -> dict:
    """The part of the results that tells of model and tasks, not of the machine."""
    return {name: results[name] for name in KEPT if results.get(name)}
