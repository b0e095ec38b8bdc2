"""Closed-loop evaluation: the simulator, episodes, many of them at once, records, and what they say."""
