"""Checkpoints that are verified before they are trusted.

Orbax writes a step in the background and commits it with one rename, so a killed run
never leaves half a step under a step's name. It does not notice damage that comes
later: a flipped byte restores silently as wrong numbers. So every committed step gets
a manifest with the sha256 of its files, outside the directories that orbax owns:

    DIR/30/                   the step: state, data, config (orbax)
    DIR/manifests/30.json     its loss and the sha256 of every file
    DIR/rejected/20-1/        a step that did not verify, moved out of the way

Restoring reads the newest step whose files all match; the others are skipped with a
warning. An old step is deleted only once a newer one has its manifest, hence the loss
and the choice of what to keep live here and not in orbax, which deletes at the commit
and cannot even list its steps when one file with metrics is damaged.

Several processes share DIR. Process 0 alone hashes, moves and deletes; the step it
chooses is broadcast.
"""

import contextlib
import itertools
import json
import logging
import math
import shutil
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from miras_jax.errors import UserError
from miras_jax.training import manifest as manifests
from miras_jax.training.manifest import Damage, Manifest
from miras_jax.training.serial import first_difference, with_new_fields

logger = logging.getLogger(__name__)

# Orbax's ending for what is not committed; a step on its way out gets it as well, so
# that whatever a killed run leaves behind is found by one pattern.
_TEMPORARY = ".orbax-checkpoint-tmp"

# What process 0 broadcasts when there is no step to restore.
_NO_STEP = -1
_NO_WHOLE_STEP = -2


class Restored(NamedTuple):
    """A step as it was saved; `loss` is None if it was saved without a finite one."""

    step: int
    state: Any
    data: dict
    loss: float | None


class Checkpoints:
    """The checkpoints of one run in `directory`, which is created if missing.

    The `keep_last` newest steps and the one with the lowest loss are kept. With
    `read_only` nothing is created, cleaned or saved: the way to look into the directory
    of a run that is still training. An error of a save that continued in the background
    is raised by the next call of any method that touches the directory.

    Raises UserError if the directory cannot be written.
    """

    def __init__(
        self, directory: str | Path, *, keep_last: int = 2, read_only: bool = False
    ):
        if keep_last < 1:
            raise UserError(f"keep_last is {keep_last}: keep at least 1 checkpoint")
        if "://" in str(directory):
            raise UserError(
                f"checkpoint directory {directory} is a URL: mount the bucket and give "
                "the path, because steps are committed by renaming"
            )
        self.directory = Path(directory).absolute()
        self._keep_last = keep_last
        self._read_only = read_only
        self._position: int | None = None
        self._damaged: set[int] = set()
        self._pending: Future | None = None
        if not read_only and jax.process_index() == 0:
            _prepare(self.directory)
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                create=False, save_root_metadata=False, lightweight_initialize=True
            ),
            item_names=("state", "data", "config"),
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "data": ocp.JsonCheckpointHandler(),
                "config": ocp.JsonCheckpointHandler(),
            },
        )
        self._background = ThreadPoolExecutor(1, thread_name_prefix="manifest")

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def steps(self) -> list[int]:
        """The committed steps in increasing order, verified or not."""
        if not self.directory.is_dir():
            return []
        names = (path.name for path in self.directory.iterdir())
        return sorted(int(name) for name in names if name.isdecimal())

    def save(
        self,
        step: int,
        state: Any,
        *,
        data: dict,
        config: dict,
        loss: float | None = None,
    ) -> None:
        """Saves a pytree of arrays; returns once it is copied from the devices.

        `data` (where the input stands) and `config` (what the model is) are JSON-able.
        `loss` ranks the step; without a finite one it is never the best. The step last
        saved or restored is not written again. Raises UserError if the directory holds
        a newer step, because then this run does not continue that one.
        """
        if self._read_only:
            raise ValueError("these checkpoints were opened with read_only=True")
        self.wait()
        self._make_way(step)
        newest = max(self.steps(), default=_NO_STEP)
        if newest == step == self._position:
            return
        if newest >= step:
            raise UserError(
                f"checkpoint directory {self.directory} already holds step {newest} "
                f"when step {step} is saved: continue from its newest step or give "
                "another --workdir"
            )
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(_present(state)),
            data=ocp.args.JsonSave(_as_json(data)),
            config=ocp.args.JsonSave(_as_json(config)),
        )
        self._manager.save(step, args=args, force=True)
        self._position = step
        finite = loss is not None and math.isfinite(loss)
        self._pending = self._background.submit(
            self._conclude, step, float(loss) if finite else None
        )

    def restore(self, abstract_state: Any, *, config: dict) -> Restored | None:
        """The newest step that verifies, or None if no step was ever finished.

        `abstract_state` is a pytree of jax.ShapeDtypeStruct with shardings, which may
        be those of another mesh than the one that saved. Raises UserError if no step
        verifies, if `config` differs from the saved one (but for fields at their
        defaults that dataclasses have gained since), or if a leaf is missing, extra or
        of another shape or dtype.
        """
        self.wait()
        return self._restore(self.steps()[::-1], abstract_state, config)

    def restore_best(self, abstract_state: Any, *, config: dict) -> Restored | None:
        """Like `restore`, by lowest loss; None if no step was saved with a loss."""
        self.wait()
        losses = self._losses()
        return self._restore(sorted(losses, key=losses.get), abstract_state, config)

    def wait(self) -> None:
        """Returns when the last save is on disk and has its manifest."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except Exception:
            # Orbax reports a failed save once to each thread that asks. The background
            # thread has its copy; this takes ours, or the next save would raise it.
            with contextlib.suppress(Exception):
                self._manager.wait_until_finished()
            raise

    def close(self) -> None:
        """Waits for the last save and frees the threads; the end of this object."""
        try:
            self.wait()
        finally:
            self._background.shutdown()
            self._manager.close()

    def _conclude(self, step: int, loss: float | None) -> None:
        """In the background: after the commit, the manifest; then the old steps go."""
        self._manager.wait_until_finished()
        if jax.process_index() != 0:
            return
        digests = manifests.digests(self._step_path(step))
        manifests.write(self._manifest_path(step), Manifest(loss, digests))

        steps, losses = self.steps(), self._losses()
        best = min(losses, key=losses.get, default=None)
        for old in steps[: -self._keep_last]:
            if old != best:
                # Renamed first: a kill must not leave half a step under its name.
                doomed = self.directory / f"{old}.old{_TEMPORARY}"
                self._step_path(old).rename(doomed)
                shutil.rmtree(doomed)
        present = {self._manifest_path(old) for old in self.steps()}
        for path in self.directory.glob("manifests/*.json"):
            if path not in present:
                path.unlink()

    def _restore(
        self, candidates: list[int], abstract_state: Any, config: dict
    ) -> Restored | None:
        chosen = _NO_WHOLE_STEP if candidates else _NO_STEP
        if jax.process_index() == 0:
            chosen = next(filter(self._verified, candidates), chosen)
            if chosen == _NO_WHOLE_STEP and self._is_unfinished(candidates):
                chosen = _NO_STEP
        if jax.process_count() > 1:
            chosen = int(multihost_utils.broadcast_one_to_all(np.int32(chosen)))
        if chosen == _NO_STEP:
            return None
        if chosen == _NO_WHOLE_STEP:
            raise UserError(
                f"no checkpoint in {self.directory} is whole (the warnings name the "
                "damaged files): put back a copy or give another --workdir"
            )
        stored = self._manager.restore(
            chosen,
            args=ocp.args.Composite(
                data=ocp.args.JsonRestore(), config=ocp.args.JsonRestore()
            ),
        )
        configs = (with_new_fields(c) for c in (stored.config, _as_json(config)))
        difference = first_difference(*configs)
        self._refuse(difference, "has another config")
        metadata = self._manager.item_metadata(chosen).state.tree
        difference = first_difference(
            _describe(metadata), _describe(jax.tree.map(_stored_form, abstract_state))
        )
        self._refuse(difference, "is of another model")
        state = self._manager.restore(
            chosen,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(_present(abstract_state))
            ),
        ).state
        if hasattr(abstract_state, "_replace"):
            state = abstract_state._replace(**state)
        # A random key is stored as integers and comes back as the kind that was saved.
        difference = first_difference(_describe(state), _describe(abstract_state))
        self._refuse(difference, "is of another model")
        self._position = chosen
        loss = manifests.read(self._manifest_path(chosen)).loss
        return Restored(chosen, state, stored.data, loss)

    def _is_unfinished(self, candidates: list[int]) -> bool:
        """Whether there is but the first step of a run that was killed between its
        commit and its manifest: nothing was lost that had been promised."""
        return len(candidates) == 1 and not self._manifest_path(candidates[0]).exists()

    def _refuse(self, difference: str | None, what: str) -> None:
        if difference is not None:
            raise UserError(
                f"checkpoint in {self.directory} {what}: {difference}; give another "
                "--workdir or the original experiment file"
            )

    def _make_way(self, step: int) -> None:
        """Moves aside the steps that do not verify: those without a manifest, those
        found damaged before, and those in the way of a save at `step`."""
        if jax.process_index() == 0:
            for old in self.steps():
                in_the_way = old >= step and old != self._position
                check = self._verified if in_the_way else self._manifest
                if old in self._damaged or check(old) is None:
                    self._reject(old)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("checkpoints: unverified steps moved")
        self._manager.reload()

    def _reject(self, step: int) -> None:
        rejected = self.directory / "rejected"
        rejected.mkdir(exist_ok=True)
        names = (f"{step}-{count}" for count in itertools.count(1))
        target = next(rejected / n for n in names if not (rejected / n).exists())
        self._step_path(step).rename(target)
        if self._manifest_path(step).exists():
            self._manifest_path(step).rename(rejected / f"{target.name}.json")
        self._damaged.discard(step)
        logger.warning("checkpoint step %d moved to %s", step, target)

    def _losses(self) -> dict[int, float]:
        """The loss of each step that was saved with one."""
        found = {step: self._manifest(step) for step in self.steps()}
        return {
            step: manifest.loss
            for step, manifest in found.items()
            if manifest is not None and manifest.loss is not None
        }

    def _manifest(self, step: int) -> Manifest | None:
        """The step's manifest; a warning and None if it is lost."""
        try:
            return manifests.read(self._manifest_path(step))
        except Damage as damage:
            return self._report(step, damage)

    def _verified(self, step: int) -> Manifest | None:
        """The step's manifest if all files match it; otherwise a warning and None."""
        try:
            manifest = manifests.read(self._manifest_path(step))
            manifests.verify(self._step_path(step), manifest)
            return manifest
        except Damage as damage:
            return self._report(step, damage)

    def _report(self, step: int, damage: Damage) -> None:
        self._damaged.add(step)
        logger.warning(
            "checkpoint step %d in %s is skipped: %s", step, self.directory, damage
        )

    def _step_path(self, step: int) -> Path:
        return self.directory / str(step)

    def _manifest_path(self, step: int) -> Path:
        return self.directory / "manifests" / f"{step}.json"


def _prepare(directory: Path) -> None:
    try:
        (directory / "manifests").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
        for leftover in directory.glob(f"*{_TEMPORARY}*"):
            shutil.rmtree(leftover)
    except OSError as error:
        raise UserError(
            f"cannot write checkpoints to {directory} ({error.strerror}): give a "
            "writable --workdir"
        ) from error


def _as_json(value: Any) -> Any:
    """A copy as it will be read back: tuples become lists."""
    return json.loads(json.dumps(value))


def _present(state: Any) -> Any:
    """A NamedTuple as the dict that orbax makes of it, less the parts that are None:
    orbax would store these, and not find them in a step that was saved before they were
    a part."""
    if not hasattr(state, "_asdict"):
        return state
    return {name: part for name, part in state._asdict().items() if part is not None}


def _stored_form(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """What is on disk for a leaf: a random key is stored as its integers."""
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.eval_shape(jax.random.key_data, leaf)
    return leaf


def _describe(tree: Any) -> dict[str, str]:
    """Path -> shape and dtype of every leaf. Orbax stores any container as a dict or a
    list, so only the names along the path are compared."""
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): (
            f"{list(leaf.shape)} {leaf.dtype}"
        )
        for path, leaf in leaves
    }
