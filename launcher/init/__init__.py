"""``muster init``: a recipe to start from, a shipped one or one that is written after a look at a model and its data.

The look reads configuration, tokenizer and the first rows, no weights. A model in a folder is looked at without torch.
"""
