"""The process in which ``muster.run`` trains: ``python -m launcher.python FILE WORD…``.

It is `muster run` itself. The caller's process, such as a notebook's kernel, keeps its memory and its signal handlers,
and does not end with a library that ends its process. An error is written to FILE as JSON.
When the caller is gone, its end of standard input is closed, and the workers commit and end.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path

from trainer.errors import MusterError
from trainer.interruption import current


def main() -> None:
    current.begin()
    file, words = Path(sys.argv[1]), sys.argv[2:]

    def watch_parent() -> None:
        while os.read(0, 1024):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch_parent, name="parent", daemon=True).start()
    from launcher.cli.app import main as cli

    def report(error: MusterError) -> None:
        told = {"error": type(error).__name__, "arguments": error.args}
        file.write_text(json.dumps(told, default=str), encoding="utf-8")

    cli(words, report)


if __name__ == "__main__":
    main()
