"""Pure functions of tensors: bases from Gram matrices, moments, spectra. This room imports torch only."""
