"""Outputs of samples, read part by part (`trainer.data.outputs`)."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np

from trainer.data.outputs import Outputs, Part, PartOutputs, StoredOutputs, decode_outputs, part_numbers
from trainer.data.prepare.prepared import PreparedDataset
from trainer.data.types import Ints, SampleRef
from trainer.storage import in_parallel

NUMBERED = 256
"""Blocks whose samples' part numbers are held."""


class OutputsReader:
    """Decoded parts of stored outputs; those used last stay in memory, up to ``memory_bytes``. Thread-safe. ``read``
    returns the bytes of a part."""

    def __init__(
        self,
        prepared: PreparedDataset,
        stored: StoredOutputs,
        read: Callable[[Part], bytes],
        memory_bytes: int,
        readers: int,
    ) -> None:
        self.prepared, self.stored, self.memory_bytes, self.readers = prepared, stored, memory_bytes, readers
        self._read = read
        self._held: OrderedDict[Part, PartOutputs] = OrderedDict()
        self._numbers: OrderedDict[tuple[int, int], Ints] = OrderedDict()
        self.held_bytes = 0
        self._lock = threading.Lock()

    def of(self, refs: Sequence[SampleRef]) -> list[Outputs]:
        """Returns the outputs of each sample. Fetches the parts that are not in memory in parallel."""
        places = [self._place(ref) for ref in refs]
        with self._lock:
            found = {part: self._held[part] for part, _ in places if part in self._held}
        missing = [part for part in dict.fromkeys(part for part, _ in places) if part not in found]

        def fetch(part: Part) -> None:
            found[part] = decode_outputs(self._read(part))

        in_parallel(fetch, missing, self.readers)
        with self._lock:
            self._hold(found)
        return [found[part].of(row) for part, row in places]

    def _place(self, ref: SampleRef) -> tuple[Part, int]:
        """Returns the part that has a sample's outputs, and its row there."""
        index = self.prepared.index(ref.window)
        block, row = int(index.block[ref.sample]), int(index.block_row[ref.sample])
        with self._lock:
            numbers = self._numbers.get((ref.window, block))
            if numbers is None:
                targets = index.targets[index.block == block]
                numbers = self._numbers[ref.window, block] = part_numbers(targets, self.stored.part_targets)
            if len(self._numbers) > NUMBERED:
                self._numbers.popitem(last=False)
        return Part(ref.window, block, int(numbers[row])), row - int(np.searchsorted(numbers, numbers[row]))

    def _hold(self, used: dict[Part, PartOutputs]) -> None:
        for part, outputs in used.items():
            if part not in self._held:
                self.held_bytes += outputs.nbytes
            self._held[part] = outputs
            self._held.move_to_end(part)
        while self.held_bytes > self.memory_bytes:
            self.held_bytes -= self._held.popitem(last=False)[1].nbytes
