"""Values that do not work together: rules between sections, and the support matrix."""
