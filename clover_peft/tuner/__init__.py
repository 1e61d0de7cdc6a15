"""The PEFT method: configuration, layers, saving and loading of CLOVER adapters.

This room imports linalg, runtime, io and base_model. docs/explanation/architecture.md, "Read the core", says in which
order its files explain the method.
"""
