"""Training of a configured network, and its exact resume."""
