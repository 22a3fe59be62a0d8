"""Every remedy of the code stands in a case of these tests, so that a new one is followed, too.

It is enough that a case has some characters of the problem and some of the remedy, side by side. A message of
which another message has these characters, such as "cannot read" and "check the path", is not missed.
"""

import ast
import re
from collections import defaultdict
from pathlib import Path

import typer

from bnpatch_cli.app import app

ROOT = Path(__file__).parents[2]
RUN = 16  # characters that stand side by side


def nodes(*folders):
    """Yield each file with all nodes of its tree."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield str(path.relative_to(ROOT)), ast.walk(ast.parse(path.read_text(encoding="utf-8")))


def fixed(node, names=()):
    """Yield the fixed parts of a text, whatever its conditions; ``names`` has the values of variables."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.Name) and node.id in names:
        for value in names[node.id]:
            yield from fixed(value)
    elif isinstance(node, (ast.IfExp, ast.JoinedStr, ast.BinOp, ast.FormattedValue)):
        for child in [node.body, node.orelse] if isinstance(node, ast.IfExp) else ast.iter_child_nodes(node):
            yield from fixed(child, names)


def runs(parts):
    """All runs of characters in some texts, and the texts that are shorter."""
    texts = [" ".join(part.split()) for part in parts]
    return {text[i : i + RUN] for text in texts for i in range(max(1, len(text) - RUN + 1))} - {""}


def messages():
    """Yield the place of each message with a remedy, and runs of characters of its problem and its remedy."""
    calls, bases, assigned = [], {}, defaultdict(lambda: defaultdict(list))
    for path, found in nodes("bnpatch", "cli"):
        for node in found:
            if isinstance(node, ast.ClassDef):
                bases[node.name] = {getattr(base, "id", "") for base in node.bases}
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "").endswith("Error"):
                calls.append((path, node))
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                name = node.targets[0].id
                for scope in (path, "everywhere") if name.isupper() else (path,):
                    assigned[scope][name].append(node.value)
    classes = {"BnpatchError"}
    while more := {name for name, of in bases.items() if of & classes} - classes:
        classes |= more
    for path, node in calls:
        if node.func.id in classes and len(node.args) > 1:
            names = assigned["everywhere"] | assigned[path]
            problem, remedy = (runs(fixed(part, names)) for part in node.args[:2])
            if remedy:
                yield f"{path}:{node.lineno}", problem, remedy


def cases():
    """Yield the texts of each row of a table, each call and each test."""
    for _, found in nodes("tests/remedies"):
        for node in found:
            parts = getattr(node, "elts", None) or getattr(node, "args", None)
            if isinstance(node, ast.FunctionDef):
                yield [text for child in ast.walk(node) for text in fixed(child)]
            elif isinstance(node, (ast.Tuple, ast.Call)) and parts:
                yield [text for part in parts for text in fixed(part)]


def test_every_remedy_is_in_a_case():
    known = [" | ".join(re.sub(r"\\(.)", r"\1", text) for text in texts) for texts in cases()]
    index = defaultdict(set)
    for number, text in enumerate(known):
        for run in runs([text]):
            index[run].add(number)

    def having(some):
        short = {number for run in some if len(run) < RUN for number, text in enumerate(known) if run in text}
        return short.union(*(index.get(run, ()) for run in some))

    unmet = [
        place
        for place, problem, remedy in messages()
        if not (having(remedy) & having(problem) if problem else having(remedy))
    ]
    assert not unmet


def options(command):
    """All options of a command and of the commands in it."""
    own = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    return own.union({"--help"}, *map(options, getattr(command, "commands", {}).values()))


def test_every_option_that_the_code_names_is_known():
    known = options(typer.main.get_command(app))
    named = {
        option: f"{path}:{node.lineno}"
        for path, found in nodes("bnpatch", "cli")
        for node in found
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        for option in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", node.value)
    }
    assert len(named) > 50
    assert not {option: place for option, place in named.items() if option not in known}
