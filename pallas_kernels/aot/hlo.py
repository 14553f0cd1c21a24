"""What the text of a compiled program says that its API does not."""

import re
from collections.abc import Iterator
from math import prod

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s64": 8, "u64": 8}
_SENDS = re.compile(
    r" = (?P<result>.+?) (?P<kind>all-gather|all-reduce|reduce-scatter|all-to-all|"
    r"collective-permute)(?:-start)?\("
)


def estimated_cycles(hlo: str) -> int:
    """What XLA itself expects a TPU program to take: loop bodies times trip count."""
    bodies = _bodies(hlo)

    def cost(name: str) -> int:
        total = 0
        for line in bodies[name]:
            if cycles := re.search(r'"estimated_cycles":"(\d+)"', line):
                total += int(cycles[1])
            for body, times in _loops(bodies, line):
                total += cost(body) * times
        return total

    return cost("ENTRY")


def sent(hlo: str) -> dict[str, int]:
    """Bytes that each device sends in one run, by kind of collective.

    Counted for rings of n devices: an all-gather sends (n - 1) / n of its result, and
    so does an all-to-all; a reduce-scatter n - 1 results; an all-reduce both of them.
    A reduce-scatter of a TPU is printed as a fusion of an all-reduce and the slice that
    a device keeps of it. A loop until something holds, of no fixed length, counts as
    one round.
    """
    bodies = _bodies(hlo)
    found: dict[str, tuple[str, float]] = {}

    def walk(name: str, times: int) -> None:
        for line in bodies[name]:
            for body, rounds in _loops(bodies, line):
                walk(body, times * rounds)
            for group in re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", line):
                walk(group, times)
            if match := _SENDS.search(line):
                # The pieces of one collective, spread over what is computed
                # meanwhile, have one channel.
                channel = re.search(r"channel_id=(\d+)", line)
                key = channel[1] if channel else line
                kind, size = match["kind"], _moved(match["kind"], match["result"], line)
                if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                    kind, size = "reduce-scatter", size / 2
                _, before = found.get(key, (kind, 0))
                found[key] = kind, max(times * size, before)

    walk("ENTRY", 1)
    total: dict[str, float] = {}
    for kind, size in found.values():
        total[kind] = total.get(kind, 0) + size
    return {kind: round(size) for kind, size in total.items()}


def _bodies(hlo: str) -> dict[str, list[str]]:
    """The lines of every computation, by name."""
    bodies: dict[str, list[str]] = {}
    name = None
    for line in hlo.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = "ENTRY" if header[1] else header[2]
            bodies[name] = []
        elif name and line.startswith("  "):
            bodies[name].append(line)
    return bodies


def _loops(bodies: dict[str, list[str]], line: str) -> Iterator[tuple[str, int]]:
    """The body of a loop in this line, if any, and how often it runs."""
    loop = re.search(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)", line)
    if loop:
        # Loops of scans count from 0 to the only constant of their condition.
        text = "\n".join(bodies[loop[1]])
        bounds = re.findall(r" [su]32\[\]\S* constant\((\d+)\)", text)
        yield loop[2], int(bounds[0]) if len(bounds) == 1 else 1


def _moved(kind: str, result: str, line: str) -> float:
    """Bytes that a device sends for one collective."""
    sizes = [
        prod(map(int, filter(None, dims.split(",")))) * _BYTES.get(dtype, 4)
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", result)
    ]
    started = re.search(r"(gather|permute)-start\(", line)
    # What is started has its operand beside its result.
    size = max(sizes) if started else sum(sizes)
    n = _devices(line)
    shares = {
        "all-gather": (n - 1) / n,
        "all-to-all": (n - 1) / n,
        "all-reduce": 2 * (n - 1) / n,
        "reduce-scatter": n - 1,
        "collective-permute": 1,
    }
    return shares[kind] * size


def _devices(line: str) -> int:
    """Of each group that a collective is among; the three ways they are printed."""
    if split := re.search(r"replica_groups=mesh\[(.*?)\].*?\{(.*?)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", split[1]))
        return prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", split[2]))
    if shape := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(shape[1])
    first = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    return len(first[1].split(",")) if first else 2
