"""Shapes in vitreg's signatures are checked while the tests run.

A function within a function is checked where its own signature has shapes. The others are left as they are:
they would be decorated again in each call of the function around them, which took half the time of the tests.
"""

import ast

import jaxtyping
from beartype import BeartypeConf, beartype
from jaxtyping import _import_hook, install_import_hook

# An int is a fine float (the numeric tower). Python's cache of compiled modules goes by the name of this
# function: it needs another one when something else is to be decorated.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))


class _Decorator(_import_hook.JaxtypingTransformer):
    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:  # noqa: N802 - ast's own name
        within = any(isinstance(parent, ast.FunctionDef) for parent in self._parents)
        if not within or _has_shapes(node):
            return super().visit_FunctionDef(node)
        self._parents.append(node)
        self.generic_visit(node)
        self._parents.pop()
        return node


def _has_shapes(node: ast.FunctionDef) -> bool:
    """Whether an argument or what is returned is, say, a Float[Tensor, "b n d"]."""
    signature = [node.args, *([node.returns] if node.returns else [])]
    parts = [part for of in signature for part in ast.walk(of) if isinstance(part, ast.Subscript)]
    return any(isinstance(part.value, ast.Name) and hasattr(jaxtyping, part.value.id) for part in parts)


def install(modules: list[str]) -> None:
    """Check these from when they are imported."""
    _import_hook.JaxtypingTransformer = _Decorator
    install_import_hook(modules, f"{__name__}.check")
