"""Model and pruner together: programs, state between control steps, dispatch, cost, and how XLA compiles them."""
