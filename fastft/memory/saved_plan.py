"""A plan as data: what `plan.json` holds."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from fastft.atomic import write_file_atomically
from fastft.blocks import BlockForwards
from fastft.errors import PlanError, nearest
from fastft.memory.budget import GIB


@dataclass(frozen=True)
class Plan:
    """What each block of a run keeps.

    Attributes:
        budget_bytes: what torch's allocator may take.
        ways: block name -> name of a way (see `fastft.blocks`).
        predicted_bytes, predicted_seconds: of a step by the model; None where it was not needed.
        peak_bytes, seconds: of a rehearsed step, measured; None where none was rehearsed.
        host_bytes: of activations that wait on the host.
    """

    budget_bytes: int
    ways: Mapping[str, str]
    predicted_bytes: int | None = None
    predicted_seconds: float | None = None
    peak_bytes: int | None = None
    seconds: float | None = None
    host_bytes: int = 0

    def save(self, path: Path) -> None:
        """Writes JSON that `load_plan` reads."""
        text = json.dumps(asdict(self), indent=2) + "\n"
        write_file_atomically(path, lambda temporary: temporary.write_text(text))

    def summary(self) -> str:
        """One line: how many blocks run which way, peak and budget, time of a step."""
        counts: dict[str, int] = {}
        for way in self.ways.values():
            counts[way] = counts.get(way, 0) + 1
        blocks = ", ".join(f"{count} x {way}" for way, count in counts.items()) or "no blocks"
        peak = self.peak_bytes or self.predicted_bytes or 0
        line = f"memory plan: {blocks}; peak {peak / GIB:.2f} of {self.budget_bytes / GIB:.2f} GiB"
        if self.host_bytes:
            line += f"; {self.host_bytes / GIB:.2f} GiB on the host"
        seconds = self.seconds or self.predicted_seconds
        return line + (f"; {1e3 * seconds:.0f} ms per step" if seconds else "")


def load_plan(path: Path, forwards: BlockForwards) -> Plan:
    """Reads a plan for these blocks.

    Raises:
        PlanError: not a plan, or one for other blocks or another `step.compile`.
    """
    if not path.exists():
        raise PlanError(
            f"memory.plan: must be 'auto', 'off' or a plan.json that fastft wrote; there is no file"
            f" '{path}'; correct it"
        )
    try:
        plan = Plan(**json.loads(path.read_text()))
        ways = plan.ways
        if not (isinstance(ways, dict) and all(isinstance(way, str) for way in ways.values())):
            raise TypeError("its ways must be names of ways by block")
        for field in fields(plan):
            value = getattr(plan, field.name)
            is_number = isinstance(value, int | float)
            if field.name != "ways" and not is_number and value is not field.default:
                raise TypeError(f"'{field.name}' must be a number; got {value!r}")
    except (OSError, ValueError, TypeError) as error:
        raise PlanError(
            f"{path}: must be a plan.json that fastft wrote; {error}; delete it for a new plan"
        ) from error
    blocks, problems = forwards.blocks, []
    if set(plan.ways) != set(blocks):
        odd = sorted(set(plan.ways) ^ set(blocks))
        problems.append(
            f"{path}: must name the blocks of this model; {len(odd)} differ, the first is"
            f" '{odd[0]}'; delete it for a new plan"
        )
    wrong: dict[str, str] = {}
    for name, way in plan.ways.items():
        if name in blocks and way not in forwards.menus[name]:
            wrong.setdefault(way, name)
    problems += [
        f"{path}: '{way}' is no way to run the block '{name}' with step.compile = '{forwards.mode}'"
        f"{nearest(way, forwards.menus[name])}"
        for way, name in wrong.items()
    ]
    if problems:
        raise PlanError(problems)
    return plan
