"""A grid of fine-tunings on the commonsense suite: its settings, its runs, and the table of their results."""
