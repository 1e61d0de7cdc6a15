"""A grid of fine-tunings on the commonsense suite: what to run, what is next, and the table that its records make."""
