"""The rewards of generated texts: functions that the recipe names, each called in processes of its own, and models."""
