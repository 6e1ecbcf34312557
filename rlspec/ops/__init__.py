"""Operations that may have an implementation for a device: one file an operation, with its public face and its CPU code.

``table`` says which implementation runs where, and why another does not; ``reference`` holds plain float64 twins, for
tests alone. Operations know nothing of models, spectra or files.
"""
