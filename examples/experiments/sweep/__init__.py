"""A search of settings on images held out, by one compiled program."""
