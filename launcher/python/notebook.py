"""The display of ``muster.run`` in a notebook: state, numbers and the curve of the loss, below the cell."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from html import escape
from typing import IO, Any

from launcher.monitor.watch import Watch
from trainer.errors import MusterError
from trainer.progress.view import LOOK_S
from trainer.storage import open_storage

WIDTH, HEIGHT, MARGIN = 640, 160, 20
"""Of the curve, in pixels."""
SHOWN_LINES, KEPT_LINES = 6, 1000
"""Lines of the driver: the last ones, and those that can be unfolded above them."""
DEADLINE_S = 10.0
OUTPUT_S = 2.0


def in_notebook() -> bool:
    """Returns True in a kernel of Jupyter, which shows HTML, and False in IPython's terminal."""
    ipython: Any = sys.modules.get("IPython")
    return ipython is not None and getattr(ipython.get_ipython(), "kernel", None) is not None


class NotebookDisplay:
    """Shows the run at ``run_uri``, and the last lines that its driver prints to ``output``."""

    def __init__(self, run_uri: str, output: IO[bytes]) -> None:
        from IPython.display import HTML, display

        self._html: Any = HTML
        self._run_uri = run_uri
        self._lines: tuple[str, ...] = ()  # replaced as a whole, since a thread adds to it
        self._watch: Watch | None = None
        self._due = 0.0
        self._cell: Any = display(HTML("<pre>starting</pre>"), display_id=True)
        self._reader = threading.Thread(target=self._read, args=(output,), daemon=True)
        self._reader.start()

    def look(self) -> None:
        """Draws what is stored now, at most every `LOOK_S` seconds."""
        if time.monotonic() >= self._due:
            self._draw()
            self._due = time.monotonic() + LOOK_S

    def close(self) -> None:
        # A process that the driver has left behind may hold the output open.
        self._reader.join(OUTPUT_S)
        self._draw()

    def _read(self, output: IO[bytes]) -> None:
        for line in output:
            self._lines = (*self._lines, line.decode(errors="replace").rstrip())[-KEPT_LINES:]

    def _draw(self) -> None:
        try:
            if self._watch is None:
                self._watch = Watch(open_storage(self._run_uri, deadline_s=DEADLINE_S))
            else:
                self._watch.look()
        except (MusterError, OSError):
            pass  # there is no run yet, or the storage does not answer: what was seen stays
        text, curve = "", ""
        if self._watch is not None:
            standing, status = self._watch.standing, self._watch.status
            parts = [status.name, status.state, *(standing.parts().values() if standing else ["no step yet"])]
            text, curve = "  ".join(parts), svg_curve(standing.losses, standing.step) if standing else ""
        before, last = self._lines[:-SHOWN_LINES], self._lines[-SHOWN_LINES:]
        folded = f"<details><summary>{len(before)} earlier lines</summary>{_block(before)}</details>" if before else ""
        self._cell.update(self._html(f"{curve}{folded}{_block((text, *last) if text else last)}"))


def _block(lines: Sequence[str]) -> str:
    text = "\n".join(lines)
    return f"<pre>{escape(text)}</pre>"


def svg_curve(losses: Sequence[float], last_step: int) -> str:
    """Returns the losses as an SVG element in the colour of the text; empty for fewer than two."""
    if len(losses) < 2:
        return ""
    low, high = min(losses), max(losses)
    across, up = (WIDTH - 2 * MARGIN) / (len(losses) - 1), (HEIGHT - 2 * MARGIN) / ((high - low) or 1.0)
    points = " ".join(
        f"{MARGIN + n * across:.1f},{HEIGHT - MARGIN - (loss - low) * up:.1f}" for n, loss in enumerate(losses)
    )
    first_step = last_step - len(losses) + 1
    labels = (
        (MARGIN, MARGIN - 6, "start", f"loss {high:.4f}"),
        (MARGIN, HEIGHT - 4, "start", f"{low:.4f}, step {first_step:,}"),
        (WIDTH - MARGIN, HEIGHT - 4, "end", f"step {last_step:,}"),
    )
    texts = "".join(
        f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="11" fill="currentColor">{text}</text>'
        for x, y, anchor, text in labels
    )
    line = f'<polyline points="{points}" fill="none" stroke="currentColor" stroke-width="1.5"/>'
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img" aria-label="loss">{line}{texts}</svg>'
