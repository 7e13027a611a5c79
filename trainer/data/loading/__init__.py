"""From prepared data to batches: blocks, caches, packs in their order, micro-batches of a rank."""
