"""Steps between the built model and the first update: layers that the loss does not reach, the weights of an adapter to
begin from, and outputs that are computed once and stored."""
