"""Visual token pruning inside openpi's own `Policy`, with nothing of openpi replaced.

    from openpi.policies import policy_config
    from openpi_patch import prune

    policy = policy_config.create_trained_policy(config, checkpoint)     # openpi's, as always
    policy = prune(policy, pruner="safe", keep=0.2)                      # the same interface, fewer tokens
    reply = policy.infer(obs)

    python -m openpi_patch.serve --pruner=safe <the arguments of openpi's serve_policy.py>

openpi's transforms, norm statistics, prompt, sample arguments and weights are used as they are in the policy.
"""

from openpi_patch.policy import PatchError, PrunedPolicy, prune

__all__ = ["PatchError", "PrunedPolicy", "prune"]
