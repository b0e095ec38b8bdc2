"""From raw requests to replies: one robot's episode, many robots, loading, and what identifies a policy."""
