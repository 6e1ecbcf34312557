"""The perturbation solver: leading singular subspaces of W_ref + E from the reference's factors and products with E.

``delta`` and ``reference`` are what it is given, ``coordinates`` is what it computes in, ``solve`` is the way through:
first order (``first_order``), an estimate of what is missing (``estimate``), sweeps where that is too much
(``refine``); ``bounds`` say how wrong the outcome can be.
"""
