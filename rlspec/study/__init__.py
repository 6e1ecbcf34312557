"""Studies: many settings tried on the same data, and what comes of them."""
