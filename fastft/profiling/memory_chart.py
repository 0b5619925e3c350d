"""The memory curve as inline SVG."""

from fastft.profiling.report import MemoryReport

# In SVG's units, which the page scales.
_WIDTH, _HEIGHT = 1000, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 24, 36


def memory_chart(memory: MemoryReport) -> str:
    """Allocated memory over the step: floor of what stays, curve, peak with its number."""
    span = max(memory.curve[-1][0], 1e-9)
    # Room above the peak for its number.
    most = max(memory.peak, 1) * 1.12

    def x(ms: float) -> float:
        return _LEFT + ms / span * (_WIDTH - _LEFT - _RIGHT)

    def y(size: float) -> float:
        return _TOP + (1 - size / most) * (_HEIGHT - _TOP - _BOTTOM)

    line = f"M{x(memory.curve[0][0]):.1f},{y(memory.curve[0][1]):.1f}"
    # Allocations are jumps: the curve is level between them.
    line += "".join(f"H{x(ms):.1f}V{y(size):.1f}" for ms, size in memory.curve[1:])
    area = f"{line}V{y(0):.1f}H{x(0):.1f}Z"
    drawn = [f'<path d="{area}" fill="#2b6cb0" fill-opacity="0.28"/>']
    drawn += _floor(memory, x(0), x(span), y)
    drawn.append(f'<path d="{line}" fill="none" stroke="#2b6cb0" stroke-width="2"/>')
    drawn += _axes(span, most, x, y)
    at, peak = max(memory.curve, key=lambda point: point[1])
    anchor = "end" if at > span / 2 else "start"
    drawn.append(
        f'<circle cx="{x(at):.1f}" cy="{y(peak):.1f}" r="4" fill="#c2511b"/>'
        f'<text x="{x(at):.1f}" y="{y(peak) - 9:.1f}" text-anchor="{anchor}">'
        f"peak {peak / 2**30:.2f} GiB at {at:.1f} ms</text>"
    )
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img"'
        f' aria-label="Allocated memory over one step">{"".join(drawn)}</svg>'
    )


def _floor(memory: MemoryReport, left: float, right: float, y) -> list[str]:
    drawn, below = [], 0
    for (name, size), colour in zip(memory.kept.items(), ("#3f7d32", "#9c6a00"), strict=False):
        top = y(below + size)
        height = y(below) - top
        drawn.append(
            f'<rect x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{height:.1f}"'
            f' fill="{colour}" fill-opacity="0.45"/>'
        )
        if height > 14:
            drawn.append(
                f'<text x="{left + 8:.1f}" y="{top + height / 2 + 4:.1f}">{name}'
                f" {size / 2**30:.2f} GiB</text>"
            )
        below += size
    return drawn


def _axes(span: float, most: float, x, y) -> list[str]:
    drawn = [
        f'<line class="axis" x1="{x(0):.1f}" x2="{x(span):.1f}" y1="{y(0):.1f}" y2="{y(0):.1f}"/>'
    ]
    for part in range(5):
        size = most / 1.12 * part / 4
        drawn.append(
            f'<line class="axis" x1="{x(0) - 4:.1f}" x2="{x(0):.1f}" y1="{y(size):.1f}"'
            f' y2="{y(size):.1f}"/>'
            f'<text x="{x(0) - 8:.1f}" y="{y(size) + 4:.1f}" text-anchor="end">'
            f"{size / 2**30:.2f}</text>"
        )
    for part in range(6):
        ms = span * part / 5
        anchor = "end" if part == 5 else "middle"
        unit = " ms" if part == 5 else ""
        drawn.append(
            f'<text x="{x(ms):.1f}" y="{y(0) + 18:.1f}" text-anchor="{anchor}">'
            f"{ms:.1f}{unit}</text>"
        )
    drawn.append(f'<text x="{x(0) - 56:.1f}" y="14">GiB</text>')
    return drawn
