"""Chat templates: how they are rendered, what they read and write, and muster's own."""
