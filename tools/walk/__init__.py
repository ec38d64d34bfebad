"""Through which files a chat walks: start a server, send it one chat, and print each hand-over from one file to another
meanwhile, in the order in which they come first, and how many there are, so that two checkouts can be compared.

    python -m tools.walk [--package DIR]  # DIR: the `python` folder of another checkout

All processes and threads are watched by Python's profile hook, which `hook/sitecustomize.py` sets where it is told to.
"""
