"""The order of samples: packs, and the order in which a run reads them. Pure functions of seeds and lengths."""
