"""A robot's side: chunks used while the next one is computed."""
