"""How many tokens of a prompt are in the cache, after these prompts."""


def cached_tokens(before: list[list[int]], prompt: list[int], page_size: int) -> int:
    longest = 0
    for earlier in before:
        whole = len(earlier) // page_size * page_size  # only whole pages are cached
        shared = 0
        for mine, theirs in zip(prompt[:-1], earlier[:whole], strict=False):  # at least one token is computed
            if mine != theirs:
                break
            shared += 1
        longest = max(longest, shared // page_size * page_size)
    return longest
