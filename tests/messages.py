"""The errors and warnings of the package as its source writes them: their constant words, in order, and what stands between them left open."""

import ast
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import peft_pte

PACKAGE = Path(peft_pte.__file__).parent
GAP = "\0"
"""What a message says that is not the same each time."""


@dataclass(frozen=True)
class Message:
    """One error or warning."""

    text: str
    kind: str
    place: str

    def starts_with(self, words):
        """Whether these are its first words, with `…` for what differs."""
        pieces = words.split("…")
        return says(words, self.text) and (not pieces[0] or self.text.startswith(pieces[0]))


def says(words, text):
    """Whether ``words``, with `…` for what differs, are in ``text``, in their order."""
    at = 0
    for piece in filter(None, words.split("…")):
        found = text.find(piece, at)
        if found < 0:
            return False
        at = found + len(piece)
    return True


@cache
def tree_of(path):
    return ast.parse(path.read_text())


def _assigned(body, name):
    """The values that statements give to a name."""
    for node in body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        if node.value if targets else False:
            yield from (node.value for target in targets if isinstance(target, ast.Name) and target.id == name)


def _imported(path, name):
    """The module of the package that a name is imported from."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ImportFrom) and any((alias.asname or alias.name) == name for alias in node.names):
            parts = (node.module or "").split(".")
            if node.level:
                base = path.parents[node.level - 1]
            elif parts[0] == "peft_pte":
                base, parts = PACKAGE, parts[1:]
            else:
                return None
            place = base.joinpath(*parts)
            return place.with_suffix(".py") if place.with_suffix(".py").exists() else place / "__init__.py"
    return None


def texts_of(node, path, scope=None):
    """All texts that an expression can be, as far as its source says; ``scope``: the function that it stands in."""
    if isinstance(node, ast.Constant):
        return [str(node.value)]
    if isinstance(node, ast.JoinedStr):
        found = [""]
        for part in node.values:
            inner = part.value if isinstance(part, ast.FormattedValue) else part
            found = [text + more for text in found for more in texts_of(inner, path)]
        return found
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [one + other for one in texts_of(node.left, path) for other in texts_of(node.right, path)]
    if isinstance(node, ast.IfExp):
        return texts_of(node.body, path) + texts_of(node.orelse, path)
    if isinstance(node, ast.Name):
        here = [] if scope is None else list(_assigned(ast.walk(scope), node.id))
        here = here or list(_assigned(tree_of(path).body, node.id))
        if here:
            return [text for value in here for text in texts_of(value, path)]
        other = _imported(path, node.id)
        there = [] if other is None else list(_assigned(tree_of(other).body, node.id))
        if there:
            return [text for value in there for text in texts_of(value, other)]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        for place in (path, _imported(path, node.func.id)):
            for made in [] if place is None else tree_of(place).body:
                if isinstance(made, ast.FunctionDef) and made.name == node.func.id:
                    given = [part.value for part in ast.walk(made) if isinstance(part, ast.Return) and part.value]
                    return [text for value in given for text in texts_of(value, place)]
    return [GAP]


def _calls(path):
    """Calls of the module that make an error or a warning, with the function around each."""

    def walk(node, scope):
        for child in ast.iter_child_nodes(node):
            inner = child if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) else scope
            if isinstance(child, ast.Call):
                called = child.func.attr if isinstance(child.func, ast.Attribute) else getattr(child.func, "id", "")
                if child.args and (called.endswith("Error") or called in ("SystemExit", "warn", "warning")):
                    yield child, called, inner
            yield from walk(child, inner)

    yield from walk(tree_of(path), None)


def messages():
    """Every error and warning that the package writes."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for call, kind, scope in _calls(path):
            for text in texts_of(call.args[0], path, scope):
                yield Message(text, kind, f"{path.relative_to(PACKAGE)}:{call.lineno}")


def all_texts():
    """Every text of the package, messages among them."""
    yield from (message.text for message in messages())
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(tree_of(path)):
            if isinstance(node, (ast.JoinedStr, ast.BinOp)) or (
                isinstance(node, ast.Constant) and isinstance(node.value, str)
            ):
                yield from texts_of(node, path)


if __name__ == "__main__":
    for message in messages():
        print(f"{message.place}\t{message.kind}\t{message.text.replace(GAP, '…')}")
