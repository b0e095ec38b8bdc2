"""The papers' analyses on recorded or live episodes: what a policy attends to, and what a pruner would have done."""
