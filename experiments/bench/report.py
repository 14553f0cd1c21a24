"""The rows of the layer benchmark as text: the table, and what follows from it."""

from collections.abc import Sequence

HEADER = (
    f"{'':60}|       tokens/s      bwd/ |     MB      |     share     | fwd+bwd x\n"
    "scope  variant                  form       chunk batch length|   forward   fwd+bwd"
    "  fwd |   fwd   both|   fwd    both | LSTM   defn"
)
FORWARD, BOTH = "forward_tokens_per_s", "both_tokens_per_s"
SHAPE = ("scope", "batch", "length")
KIND = ("scope", "variant", "form", "chunk", "batch")


def _find(
    rows: Sequence[dict], row: dict, same: Sequence[str], **wanted
) -> dict | None:
    """The row that agrees with `row` in `same` and has the wanted values."""
    wanted |= {name: row[name] for name in same}
    found = (r for r in rows if all(r[name] == value for name, value in wanted.items()))
    return next(found, None)


def _definition(rows, row):
    return _find(rows, row, ("scope", "variant", "batch"), form="definition")


def _ratio(row: dict, other: dict | None, column: str) -> str:
    return "-" if other is None else f"{row[column] / other[column]:.2f}"


def _ratios(row: dict, other: dict | None) -> str:
    if other is None:
        return "-"
    return f"{_ratio(row, other, FORWARD)} / {_ratio(row, other, BOTH)}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def table(rows: Sequence[dict]) -> str:
    """One line per row; the last two columns compare tokens/s of forward+backward."""
    lines = [HEADER, "-" * len(HEADER.splitlines()[1])]
    for row in rows:
        lstm = _find(rows, row, SHAPE, variant="lstm")
        lines.append(
            f"{row['scope']:<6} {row['variant']:<24} {row['form']:<10} "
            f"{row['chunk'] or '-':>5} {row['batch']:>5} {row['length']:>6}|"
            f"{row[FORWARD]:10,.0f}{row[BOTH]:10,.0f}"
            f"{row['backward_over_forward']:5.1f} |"
            f"{row['forward_mb']:6.0f} {row['both_mb']:6.0f}|"
            f"{_percent(row['forward_share']):>6} {_percent(row['both_share']):>7} |"
            f"{_ratio(row, lstm, BOTH):>5} "
            f"{_ratio(row, _definition(rows, row), BOTH):>6}"
        )
    if any(row["form"] == "definition" for row in rows):
        lines.append(
            "The definition is slow, so it reads few tokens; it is compared per token."
        )
    return "\n".join(lines)


def summary(rows: Sequence[dict]) -> str:
    """What the chunked form gains, per scope, variant, chunk and batch."""
    lengths = sorted({row["length"] for row in rows if row["form"] != "definition"})
    shortest, longest = lengths[0], lengths[-1]
    lines = [
        f"Chunked at {longest} tokens, forward / forward+backward: tokens/s over those "
        "of the definition, LSTM and GRU;",
        f"time per token over that at {shortest} tokens (linear: 1); backward over "
        "forward time; time of forward+backward over that of the family's model.",
        f"{'':<48}{'x definition':>16}{'x LSTM':>14}{'x GRU':>14}{'linear':>14}"
        f"{'bwd/fwd':>9}{'x family':>10}",
    ]
    for row in rows:
        if row["form"] != "chunked" or row["length"] != longest:
            continue
        short = _find(rows, row, KIND, length=shortest)
        same = (*SHAPE, "chunk", "form")
        family = _find(rows, row, same, variant=row["family"])
        name = "{scope:<6} {variant:<24} chunk {chunk:>2} batch {batch}".format(**row)
        lines.append(
            f"{name:<48}"
            f"{_ratios(row, _definition(rows, row)):>16}"
            f"{_ratios(row, _find(rows, row, SHAPE, variant='lstm')):>14}"
            f"{_ratios(row, _find(rows, row, SHAPE, variant='gru')):>14}"
            f"{_ratios(short, None if short is row else row):>14}"
            f"{row['backward_over_forward']:9.1f}"
            f"{_ratio(family, row, BOTH) if family else '-':>10}"
        )
    return "\n".join(lines)
