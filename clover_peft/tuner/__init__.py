"""The PEFT method: configuration, layers, saving and loading of CLOVER adapters.

This room imports linalg, runtime, io and base_model. `config`, `block_spec`, `maps`, `linalg.decomposition`, `bases`,
`layer` and `merging`, read in this order, are the whole method.
"""
