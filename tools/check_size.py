"""The line budget: what serves stays readable in a weekend. Exit status 1 over it, and where a file or a function is
longer than the limits; what is long is named.

The HTTP API, kernels, and the tools beside the server have budgets of their own (docs/adr/0022). README.md names the
sizes, in hundreds of lines, and is checked too.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"
PACKAGE = Path(__file__).parent.parent / "python" / "minisgl"
_MODELS = "models", "layers", "config/families.py", "config/rope.py", "kernel/activations.py"
_HYBRIDS = "config/states.py", "kvcache/states.py", "kernel/state.py", "layers/states.py"
_VECTORS = "config/pooling.py", "engine/pooling.py", "tokenizer/pooling.py", "server/routes/vectors.py"
_SCHEDULING = "scheduler/speculation.py", "scheduler/drafters.py", "scheduler/matching.py"
_DRAFTING = "engine/draft.py", "models/heads.py", "config/draft.py"
_SPECULATION = *_SCHEDULING, *_DRAFTING, "engine/shapes.py"
_BESIDE = "kernel/masks.py", "scheduler/late.py"
PARTS = {  # folders or files, their budget in lines of Python, and what it is to become: it never grows
    "from text to tokens and back": ((), 9_103, 8_140),  # all that is not named below
    "hybrids: layers, states, kernels": (_HYBRIDS, 347, 347),
    "speculation": (_SPECULATION, 800, 800),
    "masks beside a GPU": (_BESIDE, 325, 325),
    "models and their layers": (_MODELS, 1_453, 1_453),
    "embeddings and scores": (_VECTORS, 410, 200),
    "states on GPUs": (("kernel/delta.py", "kernel/triton/delta.py"), 190, 150),
    "the HTTP API": (("server", "parser", "grammar"), 5_600, 5_000),
    "the trace": (("trace",), 757, 600),
    "formats of weights": (("formats",), 800, 800),
    "GGUF files and quantisation": (("gguf", "quantize.py"), 600, 500),
    "kernels, their Python side": (("kernel",), 2_909, 2_690),
    "the page's routes": (("page",), 120, 120),
    "the command line": (("cli",), 450, 450),
    "the exercises of the course": (("learn",), 300, 300),
    "benchmark and doctor": (("benchmark", "doctor"), 1_700, 1_700),
    "the cluster": (("cluster", "scheduler/kv_events.py"), 1_476, 950),
    "the simulator": (("simulate",), 442, 442),
}
CPP_PARTS = {".cu": "CUDA", ".cuh": "CUDA", ".cc": "C++", ".h": "C++"}
LONG_FILE, MAX_FILE = 400, 500
LONG_FUNCTION, MAX_FUNCTION = 40, 60
# What is no code: comments, strings, characters, and lines for the preprocessor with those that continue them.
_BLANKED = re.compile(
    r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])\'|^[ \t]*#(?:\\\n|[^\n])*', re.S | re.M
)
_SCOPE = re.compile(r"\b(namespace|struct|class|enum|union|extern)\b[^()]*$")

_NAME = re.compile(r"\b(?!__launch_bounds__|__align__|alignas|decltype)([\w~]+|operator\W+)\s*\(")


def part_of(path: Path) -> str:
    places = {path.parts[0], str(path)}
    return next((part for part, (folders, _, _) in PARTS.items() if places & set(folders)), next(iter(PARTS)))


def python_functions(text: str) -> Iterator[tuple[str, int]]:
    """Name and number of lines of each function."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1


def cpp_functions(text: str) -> Iterator[tuple[str, int]]:
    """Name and number of lines of each function of C++ or CUDA, from its name's line to its last brace."""
    code = _BLANKED.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)
    depth, start, name, head = 0, 0, "", 0  # head: where the declaration ahead begins
    for match in re.finditer(r"[{};]", code):
        before = code[head : match.start()]
        if match[0] == "{" and not depth and _SCOPE.search(before):
            head = match.end()  # what stands in it is looked at
        elif match[0] == "{":
            if not depth:
                found = _NAME.search(before)
                name = found[1] if found else ""
                start = head + found.start() if found else match.start()
            depth += 1
        elif match[0] == "}" and depth:
            depth -= 1
            if not depth and name:
                yield name, code.count("\n", start, match.end()) + 1
        if not depth:
            head = match.end()


def check_lengths(path: Path, text: str) -> bool:
    """Whether all is shorter than the limits; what is long is named."""
    functions = cpp_functions(text) if path.suffix in CPP_PARTS else python_functions(text)
    lengths = [(f"{path}", len(text.splitlines()), LONG_FILE, MAX_FILE)]
    lengths += [(f"{path}: {name}", size, LONG_FUNCTION, MAX_FUNCTION) for name, size in functions]
    for what, size, long, limit in lengths:
        if size > long:
            print(f"{'error' if size > limit else 'warning'}: {what} has {size} lines of {limit}")
    return all(size <= limit for _, size, _, limit in lengths)


def main() -> int:
    totals, is_short = dict.fromkeys([*PARTS, *CPP_PARTS.values()], 0), True
    for file in sorted(PACKAGE.rglob("*")):
        if file.suffix not in (".py", *CPP_PARTS):
            continue
        path, text = file.relative_to(PACKAGE), file.read_text()
        is_short &= check_lengths(path, text)
        totals[CPP_PARTS.get(file.suffix) or part_of(path)] += len(text.splitlines())
    for part, (_, budget, goal) in PARTS.items():
        print(f"{part}: {totals[part]} lines of {budget}" + f" (to become {goal})" * (goal < budget))
    stated = ", ".join(f"{part} {round(total, -2):,}" for part, total in totals.items())
    is_true = stated in README.read_text()
    if not is_true:
        print(f"error: README.md does not say: {stated}")
    return int(not (is_short and is_true) or any(totals[part] > budget for part, (_, budget, _) in PARTS.items()))


if __name__ == "__main__":
    sys.exit(main())
