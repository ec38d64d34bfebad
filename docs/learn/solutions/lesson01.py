"""The processes that a server has started, by name."""

import subprocess


def workers(pid: int) -> dict[str, int]:
    listed = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    found = {}
    for line in listed.splitlines():
        child, parent, title = line.split(None, 2)
        if int(parent) == pid and title.startswith("minisgl-"):
            found[title.split()[0]] = int(child)
    return found
