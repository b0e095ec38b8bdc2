"""Which steps run everything whatever a method decides, step by step in loops."""


def slow_full_steps(seen, *, warm_start=0, grippers=()):
    """[steps] bool; a step whose alive tokens are others than before begins anew."""
    full, begun = [], 0
    for t in range(len(seen.alive)):
        if t and (seen.alive[t] != seen.alive[t - 1]).any():
            begun = t
        age = t - begun
        everything = age < max(warm_start, 1)
        if age >= 2:
            for g in grippers:
                now, before = (seen.actions[t - k, -1, g] for k in (1, 2))
                everything |= (now > 0) != (before > 0)
        full.append(bool(everything))
    return full
