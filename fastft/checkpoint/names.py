"""Names of tensors: what wrappers add to them, and how those of a file meet those of a model."""

from collections import Counter
from collections.abc import Collection, Iterable

# Attributes under which trainers keep the model; DDP calls it "module".
USUAL_PREFIXES = frozenset({"module", "model", "net", "network", "backbone", "encoder"})


def matching_prefix(names: Iterable[str], targets: Collection[str]) -> tuple[str, int]:
    """The stack of usual prefixes, often none, without which most `names` are in `targets`.

    Returns:
        (prefix, how many match); the shortest prefix of equals.
    """
    counts = Counter({"": 0})
    for name in names:
        prefix, rest, dot = "", name, "."
        while dot:
            counts[prefix] += rest in targets
            first, dot, tail = rest.partition(".")
            if first not in USUAL_PREFIXES:
                break
            prefix, rest = f"{prefix}{first}.", tail
    best = max(counts, key=lambda prefix: (counts[prefix], -len(prefix)))
    return best, counts[best]


def shared_prefix(names: Iterable[str]) -> str:
    """The stack of usual prefixes that all names begin with."""
    parts = [name.split(".")[:-1] for name in names]
    prefix = ""
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1 or column[0] not in USUAL_PREFIXES:
            break
        prefix += f"{column[0]}."
    return prefix
