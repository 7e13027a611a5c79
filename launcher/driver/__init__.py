"""`muster run`: checks the inputs, prepares the data, starts attempts and handles signals."""
