"""One token from logits."""

import math


def sample(logits: list[float], temperature: float, top_k: int, top_p: float, number: float) -> int:
    best = max(logits)
    if temperature == 0:
        return logits.index(best)
    weights = [math.exp((logit - best) / temperature) for logit in logits]
    order = sorted(range(len(logits)), key=lambda token: -logits[token])
    if top_k > 0:
        order = order[:top_k]
    total = sum(weights[token] for token in order)
    kept, mass = [], 0.0
    for token in order:
        if top_p < 1 and mass >= top_p * total:
            break
        kept.append(token)
        mass += weights[token]
    target, so_far = number * mass, 0.0
    for token in sorted(kept):  # in order of token ids
        so_far += weights[token]
        if so_far > target:
            return token
    return max(kept)
