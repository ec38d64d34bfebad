"""What comes in: bodies of requests, read within bounds, checked, and turned into prompts and sampling parameters.

One file for each dialect: `chat` (with completions; the bodies of `responses` and `messages` become chats), `native`.
The rest is for all of them.
"""
