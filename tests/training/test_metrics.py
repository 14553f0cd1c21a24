"""The log of a training run, its progress display and its plots."""

import io
import itertools
import os
import pty
import struct
import termios

import numpy as np
import pytest
from matplotlib.image import imread
from tensorboardX.proto.event_pb2 import Event, SessionLog

from miras_jax.errors import UserError
from miras_jax.training import metrics
from miras_jax.training.metrics import MetricsLog, Progress, read_table
from miras_jax.training.plots import plot_by_position, plot_losses


def train(workdir, start_step, last_step):
    """Steps start_step + 1 ... last_step, with an evaluation every 4 steps."""
    with MetricsLog(workdir, start_step=start_step) as log:
        for step in range(start_step + 1, last_step + 1):
            loss = np.float32(5) / np.float32(step + 2)
            log.write(step, {"loss": loss, "tokens": step * 2**40})
            if step % 4 == 0:
                log.write_evaluation(step, {"loss": loss + 1, "accuracy": 0.25})


def tables(workdir):
    return {path.name: path.read_bytes() for path in workdir.glob("*.csv*")}


def events(workdir):
    """All TensorBoard events: records of length, its checksum, data, its checksum."""
    found = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def scalars(workdir):
    return [
        (value.tag, event.step, value.simple_value)
        for event in events(workdir)
        for value in event.summary.value
    ]


# The log.


def test_rows_are_on_disk_when_write_returns(tmp_path):
    with MetricsLog(tmp_path / "run", start_step=0) as log:
        log.write(1, {"loss": np.float32(0.1), "tokens": 2**40})
        log.write_evaluation(1, {"loss": float("nan")})
        assert tables(tmp_path / "run") == {
            "metrics.csv": b"step,loss,tokens\n1,0.100000001,1099511627776\n",
            "evaluations.csv": b"step,loss\n1,nan\n",
        }


@pytest.mark.parametrize("checkpoint, killed", [(4, 7), (4, 8), (6, 6), (8, 11)])
def test_resumed_run_leaves_the_tables_of_an_uninterrupted_one(
    tmp_path, checkpoint, killed
):
    train(tmp_path / "whole", 0, 12)
    train(tmp_path / "resumed", 0, killed)
    train(tmp_path / "resumed", checkpoint, 12)
    assert tables(tmp_path / "resumed") == tables(tmp_path / "whole")
    steps = read_table(tmp_path / "resumed" / "metrics.csv")["step"]
    assert steps.tolist() == list(range(1, 13))


@pytest.mark.parametrize("killed", [1, 3, 9])
def test_run_killed_before_its_first_checkpoint_starts_afresh(tmp_path, killed):
    train(tmp_path / "whole", 0, 12)
    with MetricsLog(tmp_path / "again", start_step=0) as log:
        log.write_evaluation(0, {"loss": 6.0, "accuracy": 0.0})
    train(tmp_path / "again", 0, killed)
    train(tmp_path / "again", 0, 12)
    assert tables(tmp_path / "again") == tables(tmp_path / "whole")


@pytest.mark.parametrize("half", ["1", "6", "6,0.7", "step,lo"])
def test_half_written_last_line_is_dropped(tmp_path, half):
    train(tmp_path / "whole", 0, 12)
    run = tmp_path / "run"
    train(run, 0, 5)
    table = run / "metrics.csv"
    table.write_text(half if half.startswith("step") else table.read_text() + half)
    start_step = 0 if half.startswith("step") else 5
    train(run, start_step, 12)
    assert tables(run) == tables(tmp_path / "whole")


def test_repeated_step_is_logged_once(tmp_path):
    train(tmp_path, 0, 8)
    before = tables(tmp_path)
    with MetricsLog(tmp_path, start_step=8) as log:
        log.write_evaluation(8, {"loss": 9.0, "accuracy": 0.0})
    assert tables(tmp_path) == before
    assert ("heldout/loss", 8, 9.0) not in scalars(tmp_path)


def test_other_columns_are_refused(tmp_path):
    train(tmp_path, 0, 4)
    with MetricsLog(tmp_path, start_step=4) as log:
        with pytest.raises(UserError, match="columns step, loss, tokens, but .* seed"):
            log.write(5, {"loss": 1.0, "seed": 0})
    with MetricsLog(tmp_path, start_step=0) as log:  # nothing is kept, so it may
        log.write(1, {"loss": 1.0, "seed": 0})


def test_damaged_table_is_refused_and_kept(tmp_path):
    train(tmp_path, 0, 4)
    table = tmp_path / "metrics.csv"
    damaged = table.read_text() + "oops,1,2\n"
    table.write_text(damaged)
    with pytest.raises(UserError, match="does not begin with a step .'oops,1,2'"):
        MetricsLog(tmp_path, start_step=4)
    assert table.read_text() == damaged
    with pytest.raises(UserError, match="not a table of numbers"):
        read_table(table)


def test_tensorboard_has_the_same_numbers(tmp_path):
    train(tmp_path, 0, 4)
    assert scalars(tmp_path) == [
        *(
            (f"train/{name}", step, value)
            for step in range(1, 5)
            for name, value in (
                ("loss", np.float32(5) / np.float32(step + 2)),
                ("tokens", step * 2**40),
            )
        ),
        ("heldout/loss", 4, np.float32(5) / np.float32(6) + np.float32(1)),
        ("heldout/accuracy", 4, 0.25),
    ]


def test_tensorboard_is_told_to_forget_the_steps_of_a_killed_run(tmp_path):
    train(tmp_path, 0, 7)
    train(tmp_path, 4, 8)
    shown = {}
    for event in events(tmp_path):  # what TensorBoard does with them
        if event.session_log.status == SessionLog.START:
            shown = {key: n for key, n in shown.items() if key[1] < event.step}
        for value in event.summary.value:
            shown[value.tag, event.step] = shown.get((value.tag, event.step), 0) + 1
    assert set(shown.values()) == {1}
    assert [s for tag, s in shown if tag == "train/loss"] == list(range(1, 9))
    assert [s for tag, s in shown if tag == "heldout/loss"] == [4, 8]


# Progress.


class Clock:
    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(metrics, "perf_counter", lambda: self.now)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run_steps(clock, progress, steps, seconds, first=60.0):
    """Updates `seconds` apart; the first step also compiles."""
    for index, step in enumerate(steps):
        clock.now += seconds if index else first
        progress.update(step, 8 / step)


def test_plain_lines_at_each_tenth(monkeypatch):
    clock, stream = Clock(monkeypatch), io.StringIO()
    progress = Progress(1000, 0, tokens_per_step=512, stream=stream)
    run_steps(clock, progress, range(1, 1001), seconds=0.05)
    progress.close()
    lines = stream.getvalue().splitlines()
    steps = [int(line.removeprefix("step ").split("/")[0]) for line in lines]
    assert steps == [1, *range(100, 1001, 100)]
    assert lines[0] == "step 1/1000, loss 8.0000"
    assert lines[1] == "step 100/1000, loss 0.0800, 10,240 tokens/s, 0:45 left"
    assert lines[-1] == "step 1000/1000, loss 0.0080, 10,240 tokens/s, done in 1:50"
    assert "\r" not in stream.getvalue()


def test_plain_lines_of_a_slow_run_are_ten_seconds_apart(monkeypatch):
    clock, stream = Clock(monkeypatch), io.StringIO()
    progress = Progress(100_000, 2000, tokens_per_step=1, stream=stream)
    run_steps(clock, progress, range(2001, 2036), seconds=4.0)
    progress.close()  # stopped by the user: the last state is shown
    lines = stream.getvalue().splitlines()
    steps = [int(line.removeprefix("step ").split("/")[0]) for line in lines]
    assert steps == [*range(2001, 2035, 3), 2035]
    assert lines[1] == "step 2004/100000, loss 0.0040, 0 tokens/s, 108:53:04 left"


def test_speed_is_recent_and_without_compilation(monkeypatch):
    clock = Clock(monkeypatch)
    progress = Progress(1000, 0, tokens_per_step=100, stream=io.StringIO())
    assert np.isnan(progress.tokens_per_second)
    run_steps(clock, progress, [1], seconds=1.0)
    assert np.isnan(progress.tokens_per_second)
    run_steps(clock, progress, range(2, 20), seconds=2.0, first=2.0)
    assert progress.tokens_per_second == pytest.approx(50)
    run_steps(clock, progress, range(20, 101), seconds=0.5, first=0.5)
    assert progress.tokens_per_second == pytest.approx(200)


def test_notes_and_resumed_and_finished_runs_in_plain_mode():
    stream = io.StringIO()
    progress = Progress(10, 10, tokens_per_step=1, stream=stream)
    progress.note("nothing left to do")
    progress.close()
    assert stream.getvalue() == "nothing left to do\n"


def test_last_line_is_not_printed_twice(monkeypatch):
    clock, stream = Clock(monkeypatch), io.StringIO()
    progress = Progress(1, 0, tokens_per_step=1, stream=stream)
    run_steps(clock, progress, [1], seconds=1.0)
    progress.close()
    assert stream.getvalue() == "step 1/1, loss 8.0000, done in 1:00\n"


def test_bar_on_a_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("LINES", "40")
    clock, stream = Clock(monkeypatch), Terminal()
    progress = Progress(1000, 500, tokens_per_step=512, stream=stream)
    run_steps(clock, progress, range(501, 751), seconds=0.04)
    progress.note("saved step 750")
    progress.close()
    drawn = stream.getvalue()
    assert drawn.split("\r")[1].startswith(" 50%|")  # a resumed bar starts where it was
    last = drawn.rstrip("\n").split("\r")[-1]
    assert last.startswith(" 75%|") and last.endswith(
        "| step 750/1000, loss 0.0107, 12,800 tokens/s, 0:10 left"
    )
    assert "\rsaved step 750\n" in drawn  # alone on its line: the bar was wiped first
    assert drawn.endswith("\n")


@pytest.mark.parametrize("size, bar", [((24, 100), True), ((0, 0), False)])
def test_bar_needs_a_terminal_with_a_size(size, bar):
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, size)
    with os.fdopen(ours, "rb", buffering=0) as screen, os.fdopen(theirs, "w") as stream:
        progress = Progress(2, 0, tokens_per_step=1, stream=stream)
        progress.update(2, 3.0)
        progress.close()
        drawn = b""
        while not drawn.endswith(b"\n"):  # it arrives in pieces
            drawn += screen.read(10_000)
    assert b"step 2/2, loss 3.0000, done in 0:00" in drawn
    assert (b"100%|" in drawn) == bar


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0, "0:00"),
        (59.6, "1:00"),
        (65, "1:05"),
        (3725, "1:02:05"),
        (360_000, "100:00:00"),
    ],
)
def test_durations(seconds, text):
    assert metrics.format_duration(seconds) == text


# Plots.


def near(image, colour, tolerance=0.1):
    """How many pixels have about this colour (hexadecimal)."""
    colour = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return int((np.abs(image[..., :3] - colour).max(-1) < tolerance).sum())


def test_loss_plot_shows_training_held_out_and_references(tmp_path):
    train(tmp_path, 0, 400)
    path = plot_losses(tmp_path, title="a run", references={"a baseline": 2.0})
    assert path == tmp_path / "loss.png"
    image = imread(path)
    assert image.shape == (500, 800, 4)
    for colour in ("#0072b2", "#d55e00", "#009e73"):
        assert near(image, colour) > 200
    # Steeply down from the upper left: not below it, nor above on the right.
    assert near(image[30:300, 60:100], "#0072b2") > 50
    assert near(image[300:430, 60:75], "#0072b2") == 0
    assert near(image[150:300, 400:], "#0072b2") == 0


def test_loss_plot_without_evaluations_and_with_broken_losses(tmp_path):
    losses = itertools.chain([4.0, 3.5, float("nan"), float("inf")], [3.0] * 20)
    with MetricsLog(tmp_path, start_step=0) as log:
        for step, loss in enumerate(losses, start=1):
            log.write(step, {"loss": loss})
    image = imread(plot_losses(tmp_path, tmp_path / "plots" / "train.png"))
    assert near(image[300:, 400:], "#0072b2") > 200
    assert near(image, "#d55e00") == 0


def test_loss_plot_of_a_single_step(tmp_path):
    train(tmp_path, 0, 1)
    image = imread(plot_losses(tmp_path))
    assert near(image[:, 700:], "#0072b2") > 5


def test_plot_by_position(tmp_path):
    position = np.arange(1, 513)
    curves = {"one": 2 + 3 / position, "two": (2.5 + 3 / position)[:256]}
    path = plot_by_position(curves, tmp_path / "position.png", title="by position")
    image = imread(path)
    assert image.shape == (500, 800, 4)
    assert near(image, "#0072b2") > 500 and near(image, "#d55e00") > 500
    # On a logarithmic axis of nine octaves, the shorter curve ends an octave early.
    assert near(image[200:, 720:], "#0072b2") > 20
    assert near(image[200:, 720:], "#d55e00") == 0
    assert near(image[200:, 600:680], "#d55e00") > 20


def test_many_curves_are_named_beside_the_plot(tmp_path):
    """Seven, of which the last is dashed in the colour of the first."""
    position = np.arange(1, 129)
    curves = {f"model {i}": 2 + i + 3 / position for i in range(7)}
    image = imread(plot_by_position(curves, tmp_path / "position.png"))
    assert image.shape == (500, 800, 4)
    names = image[:, 700:, :3].sum(axis=2) < 1.5
    assert names.any(axis=1).sum() > 7 * 8
    blue = (np.abs(image[:, :640, :3] - [0, 0x72 / 255, 0xB2 / 255]) < 0.1).all(axis=2)
    # The highest curve has gaps, the lowest has none.
    top, bottom = blue[:250, 300:600].any(axis=0), blue[250:, 300:600].any(axis=0)
    assert 0.3 < top.mean() < 0.95 and bottom.all()


def test_plot_errors_say_what_to_do(tmp_path):
    with pytest.raises(UserError, match="metrics.csv does not exist: give"):
        plot_losses(tmp_path)
    table = tmp_path / "metrics.csv"
    for content in ("", "step,loss\n", "step,loss\n1,2."):
        table.write_text(content)
        with pytest.raises(UserError, match="metrics.csv has no rows: let the run"):
            plot_losses(tmp_path)
    table.write_text("step,lo\n1,2.0\n")
    with pytest.raises(UserError, match="no column 'loss'"):
        plot_losses(tmp_path)
    table.write_text("step,loss\n1,2.0\n2,2.0,3.0\n")
    with pytest.raises(UserError, match="not a table of numbers"):
        plot_losses(tmp_path)
    table.write_text("step,loss\n1,2.0\n")
    (tmp_path / "evaluations.csv").write_text("step,loss\n")
    with pytest.raises(UserError, match="evaluations.csv has no rows"):
        plot_losses(tmp_path)
    with pytest.raises(UserError, match="no curve to plot"):
        plot_by_position({}, tmp_path / "position.png")
    with pytest.raises(UserError, match=r"'m' have shape \[2, 3\]"):
        plot_by_position({"m": np.ones((2, 3))}, tmp_path / "position.png")
