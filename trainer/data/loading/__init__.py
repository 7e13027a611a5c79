"""Reading prepared data: blocks, caches, the order of packs, and the micro-batches of a rank."""
