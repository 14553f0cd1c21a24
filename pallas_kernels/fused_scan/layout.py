"""A step as a list of products over tiles, for chips whose registers hold only a few.

Triton keeps every value in registers and takes sizes that are powers of two. A chunk
step has neither: its weights and hidden layers are larger than the registers of a whole
multiprocessor, and head dimensions may be 96. So the step's equations are evaluated
tile by tile. What lies between matrix products (elementwise, broadcast, transposed) is
not stored, unless it is computed and read more than once: each tile of it is made where
it is read. Results of products and sums go to scratch memory, which a program reads
back tile by tile from the second-level cache; only single numbers stay in registers.

A loop of a fixed number of rounds is a layout in a layout: what enters and leaves it is
in scratch memory, and a round writes a new carry, which becomes the next one's.

`Layout` decides this from the equations alone; `Layout.run` emits the code.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal, Var

from pallas_kernels.fused_scan.emitter import Emitter
from pallas_kernels.fused_scan.tiles import (
    ELEMENTWISE,
    JOINS,
    MOVES,
    REDUCTIONS,
    Machine,
    Memory,
    Refused,
    is_precise,
    padded,
)

LOOP = "scan"


class Tuning(NamedTuple):
    """How a program is laid out; changes its speed, never its result."""

    tile: int  # largest extent of a tile
    precise: int  # in products at full precision, which hold each operand in two parts


class Rounds(NamedTuple):
    """A loop: its body, the slots that this works in, and those of the new carry."""

    body: "Layout"
    scratch: dict[Any, list[int]]
    carry: list[tuple[Any, int]]


class Layout:
    """A jaxpr without calls, evaluated by tiles.

    `scratch`: `{(shape, dtype): count}` of the arrays that it needs.
    """

    def __init__(self, jaxpr: Any, tuning: Tuning):
        self.tuning = tuning
        self.jaxpr = jaxpr
        for eqn in jaxpr.eqns:
            _check(eqn)
        self.loops = {}  # moment of a loop -> Rounds
        self._addressed = frozenset(
            atom
            for eqn in jaxpr.eqns
            if eqn.primitive.name in (LOOP, "split")
            for atom in eqn.invars
            if isinstance(atom, Var)
        )
        self._plan()

    @cached_property
    def _outputs(self) -> dict[Var, list[int]]:
        """The outputs that each variable is."""
        places = defaultdict(list)
        for k, var in enumerate(self.jaxpr.outvars):
            places[var].append(k)
        return places

    def _plan(self):
        """What is stored, when is it last read, and where does it stay until then?"""
        self.kept = set()
        readers = self._readers(frozenset())
        self.kept.clear()
        self._place(self._readers(self._cuts(readers)))

    def _readers(self, cuts) -> dict[Var, set]:
        """The moments at which each variable is read; fills `kept`."""
        readers, fused = defaultdict(set), set()
        for moment in reversed(range(len(self.jaxpr.eqns))):
            eqn = self.jaxpr.eqns[moment]
            name = eqn.primitive.name
            for out in eqn.outvars:
                if out in self._outputs:
                    readers[out].add((moment, "output"))
            if name == LOOP:
                self.kept.update(eqn.outvars)
                for atom in eqn.invars:
                    if isinstance(atom, Var):
                        readers[atom].add((moment, "loop"))
                continue
            if name == "split":
                (atom,) = eqn.invars
                readers[atom].update(*(readers[out] for out in eqn.outvars))
                continue
            (out,) = eqn.outvars
            kept = out in cuts or out in self._addressed
            kept |= name in REDUCTIONS or name == "concatenate"
            # A product that nothing but one output reads is computed as that is stored.
            # One that it multiplies would be computed again for every tile of it,
            # another one beside it leaves no registers, and one at full precision has
            # tiles of its own.
            if name == "dot_general":
                ways = [way for _, way in readers[out]]
                kept |= ways != ["output"] or bool(readers[out] & fused)
                kept |= is_precise(eqn)
                if not kept:
                    fused |= readers[out]
            if kept:
                self.kept.add(out)
                read = {(moment, "result")}
            elif name == "dot_general":
                read = {(last, "product") for last, _ in readers[out]}
            else:
                read = readers[out]
            for atom in eqn.invars:
                if isinstance(atom, Var):
                    readers[atom] |= read
        return readers

    def _cuts(self, readers) -> frozenset[Var]:
        """What would otherwise be computed more than once, and not only moved."""
        uses = Counter(
            atom
            for eqn in self.jaxpr.eqns
            for atom in eqn.invars
            if isinstance(atom, Var)
        )
        return frozenset(
            out
            for eqn in self.jaxpr.eqns
            if eqn.primitive.name in ELEMENTWISE
            for out in eqn.outvars
            if uses[out] > 1 and len(readers[out]) > 1
        )

    def _place(self, readers):
        live = {}  # kept variable -> last moment
        self._free = defaultdict(list)
        self.scratch = defaultdict(int)
        self.slots = {}  # variable -> (key, number) of its scratch array, if it has one
        for moment, eqn in enumerate(self.jaxpr.eqns):
            is_loop = eqn.primitive.name == LOOP
            for out in eqn.outvars:
                if out not in self.kept:
                    continue
                if out.aval.shape or is_loop or out in self._addressed:
                    shape, dtype = _key(out.aval)
                    self.slots[out] = self._take((self._room.get(out, shape), dtype))
                live[out] = max((m for m, _ in readers[out]), default=moment)
            if is_loop:
                self._place_loop(moment, eqn)
            for var in [v for v, last in live.items() if last <= moment]:
                del live[var]
                if var in self.slots:
                    self._give_back(self.slots[var])

    @cached_property
    def _room(self) -> dict[Var, tuple[int, ...]]:
        """Shapes of slots in which parts of an array have their last tiles, too."""
        room, limit = {}, self.tuning.tile
        for eqn in self.jaxpr.eqns:
            if eqn.primitive.name == "concatenate":
                (whole,), parts, axis = eqn.outvars, eqn.invars, eqn.params["dimension"]
            elif eqn.primitive.name == "split":
                (whole,), parts, axis = eqn.invars, eqn.outvars, eqn.params["axis"]
            else:
                continue
            shape, start = list(room.get(whole, whole.aval.shape)), 0
            for part in parts:
                end = start + padded(part.aval.shape, limit)[axis]
                if end > padded(shape, limit)[axis]:
                    shape[axis] = end
                start += part.aval.shape[axis]
            room[whole] = tuple(shape)
        return room

    def _take(self, key):
        """A slot that is free."""
        if not self._free[key]:
            self._free[key].append(self.scratch[key])
            self.scratch[key] += 1
        return key, self._free[key].pop()

    def _give_back(self, slot):
        key, number = slot
        self._free[key].append(number)

    def _place_loop(self, moment, eqn):
        body = Layout(eqn.params["jaxpr"].jaxpr, self.tuning)
        carry = [
            self._take(_key(var.aval)) for var in eqn.outvars[: eqn.params["num_carry"]]
        ]
        taken = [self._take(key) for key, n in body.scratch.items() for _ in range(n)]
        scratch = defaultdict(list)
        for key, number in taken:
            scratch[key].append(number)
        self.loops[moment] = Rounds(body, scratch, carry)
        for slot in (*carry, *taken):
            self._give_back(slot)

    def run(
        self,
        inputs: Sequence[Memory],
        outputs: Sequence[Memory],
        scratch: dict[Any, Sequence[Memory]],
        machine: Machine,
    ) -> None:
        """Emit the code. inputs: the constants first; outputs must not overlap them."""
        emitter = Emitter(self, inputs, scratch, machine)
        for var in (*self.jaxpr.constvars, *self.jaxpr.invars):
            for k in self._outputs.get(var, ()):
                emitter.write(var, outputs[k])
        for k, atom in enumerate(self.jaxpr.outvars):
            if isinstance(atom, Literal):
                emitter.write(atom, outputs[k])
        for moment, eqn in enumerate(self.jaxpr.eqns):
            if moment in self.loops:
                emitter.loop(eqn, self.loops[moment])
            elif eqn.outvars[0] in self.kept:
                emitter.keep(eqn)
            else:
                emitter.define(eqn)
            for out in eqn.outvars:
                for k in self._outputs.get(out, ()):
                    emitter.write(out, outputs[k])


def _key(aval):
    return aval.shape, jnp.dtype(aval.dtype)


@dataclass(frozen=True)
class _Blank:
    """A `Memory` that only has a dtype."""

    dtype: jnp.dtype

    def load(self, place):
        return jnp.zeros([p.size for p in place], self.dtype)

    def store(self, place, tile):
        pass


def objection(jaxpr: Any, tuning: Tuning, machine: Machine) -> str | None:
    """Why a jaxpr cannot be evaluated by tiles, found by trying; None if it can."""

    def attempt():
        layout = Layout(jaxpr, tuning)
        blank = lambda atom: _Blank(atom.aval.dtype)  # noqa: E731
        slots = {key: [_Blank(key[1])] * n for key, n in layout.scratch.items()}
        inputs = (*jaxpr.constvars, *jaxpr.invars)
        layout.run(
            list(map(blank, inputs)), list(map(blank, jaxpr.outvars)), slots, machine
        )
        return jnp.zeros(())

    try:
        jax.eval_shape(attempt)
    except Refused as refused:
        return str(refused)
    return None


def _check(eqn) -> None:
    name = eqn.primitive.name
    known = ELEMENTWISE | MOVES | JOINS | REDUCTIONS.keys() | {"dot_general", LOOP}
    if name not in known:
        raise Refused(
            f"has no {name}, which the step uses; a step is made of "
            "elementwise functions, broadcasts, transposes, joined and cut arrays, "
            "sums, maxima, matrix products and loops of a fixed number of rounds"
        )
