"""Through which files one chat walks: start a server, send it one chat, and print each file that is entered meanwhile and each
hand-over from one file to another, in the order in which they come first. Two checkouts can be compared by the counts.

    python -m tools.walk [--package DIR]  # DIR: the `python` folder of another checkout

All processes and threads are watched, by Python's own profile hook, which `hook/sitecustomize.py` sets where it is told to.
"""
