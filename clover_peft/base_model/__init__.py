"""Facts about a frozen base model: its heads and pairs, its weights, and the moments of its activations.

This room imports linalg, runtime and io.
"""
