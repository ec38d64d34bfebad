"""`python -m minisgl.learn`: the list of lessons, and `check N [FILE]`."""

import runpy
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from minisgl.learn import Wrong, computing, serving

CHECKS: dict[int, tuple[str, str, Callable[..., str]]] = {
    1: ("the process tree", "workers", serving.check_workers),
    2: ("one request, eight stages", "durations", serving.check_durations),
    3: ("messages on the wire", "read_frame", serving.check_read_frame),
    4: ("pages and the radix tree", "cached_tokens", serving.check_cached_tokens),
    5: ("continuous batching and chunked prefill", "grant", serving.check_grant),
    6: ("overlap", "finish_times", serving.check_finish_times),
    7: ("sampling and grammars", "sample", computing.check_sample),
    8: ("the model, from config to kernel", "num_weights, kv_bytes", computing.check_sizes),
    9: ("tensor parallelism", "part", computing.check_part),
    10: ("measuring and tuning", "speedup", computing.check_speedup),
}


def main(argv: list[str]) -> int:
    """Exit status: 0 where the exercise is solved, 1 where it is not, 2 for a wrong call."""
    match argv:
        case []:
            lessons = [f"{number:3}  {title}: {names}" for number, (title, names, _) in CHECKS.items()]
            print("\n".join([*lessons, "", "Write it into lessonNN.py, then: python -m minisgl.learn check NN [FILE]"]))
            return 0
        case ["check", number, *files] if number.isdecimal() and int(number) in CHECKS and len(files) < 2:
            return check_lesson(int(number), Path(*files or [f"lesson{int(number):02}.py"]))
    print("usage: python -m minisgl.learn [check LESSON [FILE]]; LESSON is from 1 to 10", file=sys.stderr)
    return 2


def check_lesson(number: int, path: Path) -> int:
    _, names, check = CHECKS[number]
    try:
        if not path.is_file():
            raise Wrong(f"{path} is not there: it is to define {names}; the lesson shows its beginning")
        written = runpy.run_path(str(path), run_name=f"lesson{number:02}")
        if missing := [name for name in names.split(", ") if not callable(written.get(name))]:
            raise Wrong(f"{path} does not define {', '.join(missing)}")
        right = check(*(written[name] for name in names.split(", ")))
    except Exception as error:
        if not isinstance(error, Wrong):
            traceback.print_exc()
        print(f"not yet: {error or type(error).__name__}", file=sys.stderr)
        return 1
    print(f"lesson {number}: solved. {right}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
