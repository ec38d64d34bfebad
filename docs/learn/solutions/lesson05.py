"""How many tokens each request computes in the next step."""


def grant(left: list[int], budget: int) -> list[int]:
    granted = []
    for tokens in left:
        share = min(tokens, budget)
        granted.append(share)
        budget -= share
    return granted
