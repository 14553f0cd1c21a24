"""Which files a corpus is made of."""

import glob
from pathlib import Path

from miras_jax.errors import UserError
from miras_jax.training.data import TextFiles


def find(config: TextFiles, split: str) -> list[list[Path]]:
    """The files of each pattern of one split, sorted within a glob, each file once.

    UserError: a pattern that no file matches, no file that holds anything.
    """
    found: dict[Path, None] = {}
    groups = []
    for pattern in getattr(config, split):
        exact = [pattern] if Path(pattern).is_file() else []
        matches = exact or sorted(glob.glob(pattern, recursive=True))
        paths = [Path(match) for match in matches if Path(match).is_file()]
        if not paths:
            raise UserError(
                f"no file matches {pattern!r} (TextFiles.{split}) in {Path.cwd()}; "
                "correct the path or start from the directory it is relative to"
            )
        groups.append([p for p in dict.fromkeys(paths) if p not in found])
        found |= dict.fromkeys(paths)
    if not any(path.stat().st_size for path in found):
        raise no_text(split, len(found))
    return groups


def no_text(split: str, files: int) -> UserError:
    """The error of a split that holds nothing to read."""
    return UserError(
        f"TextFiles.{split} holds no text ({files} files, all empty); "
        "name at least one file that is not empty"
    )
