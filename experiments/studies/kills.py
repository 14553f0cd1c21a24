"""Kill a training run again and again, and see that it never notices.

python -m experiments.studies.kills --kills 10

Trains a small Yaad on Jane Austen once without interruption, then the same again under
`kill -9`: while it starts and compiles, between steps, while it saves and while it
evaluates, each time at a random moment. After every kill the run is started again, and
every row that it has written by the next kill must be that of the uninterrupted run, to
the last digit; at its end the parameters must have the same sha256. Prints a line per
kill and exits with status 1 if any of it fails. Takes one to two minutes on two cores.
"""

import argparse
import hashlib
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from miras_jax import variants
from miras_jax.nn.miras import Miras
from miras_jax.nn.model import Model
from miras_jax.training.config import Experiment
from miras_jax.training.data import TextFiles
from miras_jax.training.optimizer import AdamW
from miras_jax.training.run import Run
from miras_jax.training.tokenizer import Bytes

AUSTEN = Path(__file__).parents[1] / "data" / "austen"
MOMENTS = ("starting", "training", "saving", "evaluating")
COMMAND = "import sys; from miras_jax.cli import main; sys.exit(main())"


def experiment() -> Experiment:
    """Reads `train.txt` and `heldout.txt` in the working directory."""
    return Experiment(
        model=Model(width=64, depth=2, mixers=(Miras(variants.yaad(), num_heads=2),)),
        data=TextFiles(("train.txt",), ("heldout.txt",), 128, Bytes()),
        optimizer=AdamW(warmup_steps=10),
        steps=60,
        batch_size=8,
        evaluate_every=12,
        checkpoint_every=5,
    )


class Trial:
    """One run, from its first start to its end, however often it is killed."""

    def __init__(self, folder: Path, name: str):
        self.folder, self.workdir = folder, folder / name
        self.output = folder / f"{name}.txt"

    def start(self) -> subprocess.Popen:
        """The run as a user starts it; compiled programs are kept for the next time."""
        command = [
            sys.executable,
            "-c",
            COMMAND,
            "train",
            str(Path(__file__).resolve()),
        ]
        with open(self.output, "w") as output:
            return subprocess.Popen(
                [*command, "--workdir", str(self.workdir)],
                cwd=self.folder,
                env=os.environ | {"JAX_COMPILATION_CACHE_DIR": f"{self.workdir}-cache"},
                stdout=output,
                stderr=output,
            )

    def rows(self, table: str = "metrics.csv") -> dict[int, list[str]]:
        """The whole rows of a table by step, without the speed."""
        path = self.workdir / table
        lines = path.read_text().split("\n")[1:-1] if path.is_file() else []
        cells = [line.split(",") for line in lines]
        return {int(row[0]): row[1:5] for row in cells}

    def saved(self) -> int:
        """The newest step that the run can continue from, 0 for the beginning."""
        manifests = self.workdir.glob("checkpoints/manifests/*.json")
        return max((int(path.stem) for path in manifests), default=0)

    def is_saving(self) -> bool:
        return any(self.workdir.glob("checkpoints/*.orbax-checkpoint-tmp*"))

    def began_at(self) -> int | None:
        """The step from which the last start went on; None if it came to no step."""
        found = re.search(r"from (?:step (\d+)|the beginning)", self.output.read_text())
        return int(found[1] or 0) if found else None

    def digest(self) -> str:
        """The sha256 of parameters, optimizer state and counters at the end."""
        whole = hashlib.sha256()
        for leaf in jax.tree.leaves(Run.open(self.workdir).restore("last").state):
            whole.update(np.asarray(leaf).tobytes())
        return whole.hexdigest()


def reach(moment: str, process, trial: Trial, startup: float, chance) -> None:
    """Returns at a random time in such a moment, or when the process has ended."""
    every = experiment().evaluate_every
    there = max(trial.rows(), default=0)
    aim = there + chance.randrange(1, 8)
    latest = time.perf_counter() + chance.uniform(0, startup)

    def come() -> bool:
        last = max(trial.rows(), default=0)
        match moment:
            case "starting":
                return last > there or time.perf_counter() > latest
            case "training":
                return last >= aim
            case "saving":
                return last >= aim and trial.is_saving()
            case "evaluating":
                return last > there and last % every == 0

    while process.poll() is None and not come():
        time.sleep(0.002)
    time.sleep(chance.uniform(0, 0.05))


def differences(trial: Trial, reference: Trial) -> list[str]:
    """What in the tables of the trial is not in those of the uninterrupted run."""
    return [
        f"{table}, step {step}: {row}, uninterrupted {reference.rows(table).get(step)}"
        for table in ("metrics.csv", "evaluations.csv")
        for step, row in trial.rows(table).items()
        if reference.rows(table).get(step) != row
    ]


def soak(folder: Path, kills: int, chance: random.Random) -> None:
    """Kills until `kills` exact continuations were seen; SystemExit at a difference."""
    (folder / "train.txt").write_text((AUSTEN / "emma.txt").read_text()[:200_000])
    heldout = (AUSTEN / "persuasion.txt").read_text()[:30_000]
    (folder / "heldout.txt").write_text(heldout)
    reference = Trial(folder, "uninterrupted")
    begin = time.perf_counter()
    process = reference.start()
    while process.poll() is None and not reference.rows():
        time.sleep(0.01)
    startup = time.perf_counter() - begin
    if process.wait() != 0:
        raise SystemExit(reference.output.read_text())
    expected = reference.digest()
    print(f"uninterrupted: {time.perf_counter() - begin:.0f} s, sha256 {expected[:16]}")

    killed = trials = 0
    waiting: list[tuple[str, int]] = []  # kills since the run last came to a step
    trial = None
    while killed < kills or waiting:
        if trial is None:
            trials += 1
            trial = Trial(folder, f"killed-{trials}")
        process = trial.start()
        begin = time.perf_counter()
        if killed < kills:
            moment = MOMENTS[killed % len(MOMENTS)]
            reach(moment, process, trial, startup, chance)
            process.kill()
        code = process.wait()
        seconds = time.perf_counter() - begin
        if code not in (0, -signal.SIGKILL):
            lines = [line for line, _ in waiting]
            raise SystemExit("\n".join([*lines, trial.output.read_text()]))

        wrong = differences(trial, reference)
        if code == 0 and trial.digest() != expected:
            wrong.append("the state at the end has another sha256")
        if (began := trial.began_at()) is not None:
            for line, saved in waiting:
                if began != saved:
                    wrong.append(f"started from {began}, not {saved}")
                print(line, "DIFFERS" if wrong else f"resumed from {saved}", flush=True)
            waiting = []
        if wrong:
            raise SystemExit("\n".join(wrong))
        if code == 0:
            trial = None
            continue
        killed += 1
        half = ", half a checkpoint" if trial.is_saving() else ""
        step = max(trial.rows(), default=0)
        line = f"kill {killed}: {moment} after {seconds:.1f} s, at step {step}{half};"
        waiting.append((line, trial.saved()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        soak(Path(folder), arguments.kills, random.Random(arguments.seed))
    print(f"{arguments.kills} of {arguments.kills} resumed bit-identically")


if __name__ == "__main__":
    main()
