"""From raw inputs to prepared data: split, encoded once, stored in windows."""
