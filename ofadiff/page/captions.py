"""What stands under a picture, as HTML."""

from __future__ import annotations

from collections.abc import Sequence

from ofadiff.page.playground import Picture

# Of the plot of a schedule, pixels: the plot itself, and the room for its words.
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 360, 80, 34, 8, 18


def caption(picture: Picture, sizes: Sequence[float]) -> str:
    """A picture's time and costs, and the sizes of its steps where it was drawn with a schedule.

    Args:
        picture: The picture.
        sizes: The checkpoint's sizes, ascending.
    """
    costs, scheduled = picture.costs, picture.schedule is not None
    rows = {
        "time": f"{picture.seconds:.2f} s",
        "parameters": f"{'up to ' if scheduled else ''}{costs.params / 1e6:,.2f} M ({costs.params_share:.1%})",
        "MACs": "not counted"
        if costs.macs_share is None
        else f"{costs.macs_share:.1%}{' over the steps' if scheduled else ''}",
        "weights": f"{costs.weight_bytes / 1e6:,.1f} MB",
    }
    if picture.peak_bytes is not None:
        rows["peak memory"] = f"{picture.peak_bytes / 1e6:,.0f} MB, all sizes included"
    cells = "".join(f"<tr><th>{name}</th><td>{value}</td></tr>" for name, value in rows.items())
    plot = "" if picture.schedule is None else step_plot(picture.schedule, sizes)
    return f'<div class="caption"><table>{cells}</table>{plot}</div>'


def step_plot(schedule: Sequence[float], sizes: Sequence[float]) -> str:
    """The size of every step as an SVG of one line, from the first step on the left to the last.

    Args:
        schedule: A size for each step.
        sizes: The checkpoint's sizes, ascending: the lines of the plot.
    """
    lowest, highest = sizes[0], sizes[-1]

    def height_of(size: float) -> float:
        share = 1.0 if highest == lowest else (size - lowest) / (highest - lowest)
        return TOP + HEIGHT * (1 - share)

    step = WIDTH / len(schedule)
    points = [
        f"{LEFT + place * step:.1f},{height_of(size):.1f}"
        for number, size in enumerate(schedule)
        for place in (number, number + 1)
    ]
    lines = "".join(
        f'<line x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{height_of(size):.1f}" y2="{height_of(size):.1f}" opacity="0.2"/>'
        for size in sizes
    )
    shown = dict.fromkeys((lowest, *schedule, highest))
    words = "".join(
        f'<text x="{LEFT - 6}" y="{height_of(size) + 4:.1f}" text-anchor="end">{size:g}</text>' for size in shown
    )
    below = TOP + HEIGHT + BOTTOM - 3
    words += f'<text x="{LEFT}" y="{below}">step 1</text>'
    words += f'<text x="{LEFT + WIDTH}" y="{below}" text-anchor="end">step {len(schedule)}</text>'
    return (
        f'<svg class="steps" role="img" aria-label="sizes over the steps" '
        f'viewBox="0 0 {LEFT + WIDTH + 4} {TOP + HEIGHT + BOTTOM}">'
        f'<g stroke="currentColor">{lines}<polyline points="{" ".join(points)}" fill="none" stroke-width="2"/></g>'
        f'<g fill="currentColor" font-size="11">{words}</g></svg>'
    )
