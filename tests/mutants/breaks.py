"""Small breaks of a source file, one at a time.

mutmut's operators make most of them: another comparison, another number, `or` for `and`. Four kinds
come on top: a condition turned round, a statement left out, a keyword argument left out, a check
that never raises. Two kinds of mutmut's are not made, because they fail in any test that runs them:
None for an argument, and None for a local variable.

mutmut's own runner is not used. It leaves out functions with decorators, and it needs the whole
suite once to learn which tests run a function.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import libcst as cst
from libcst import matchers as m
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation import mutators

_OPERATORS = [
    (kind, operator)
    for kind, operator in mutators.mutation_operators
    if operator not in (mutators.operator_arg_removal, mutators.operator_assignment)
]
# what only people or type checkers read, and assertions, which state what cannot happen
_NOT_BROKEN = (
    m.Annotation()
    | m.Assert()
    | m.Decorator()
    | m.Import()
    | m.ImportFrom()
    | m.Raise()
    | m.SimpleString()
    | m.FormattedString()
    | m.ConcatenatedString()
    | m.Call(m.Name("isinstance") | m.Name("TypeVar"))
    | m.Call(m.Attribute(m.Name("logger") | m.Name("warnings")))
    | m.If(m.Name("TYPE_CHECKING"))
    | m.Assign([m.AssignTarget(m.Name("__all__") | m.Name("logger"))])
)
_LEFT_OUT = (
    m.Expr(m.Call())
    | m.Assign([m.AssignTarget(m.Attribute() | m.Subscript())])
    | m.AugAssign()
    | m.Del()
    | m.Raise()
)
_TURNED_ROUND_BY_MUTMUT = m.UnaryOperation(m.Not()) | m.Comparison(
    comparisons=[m.ComparisonTarget(m.Is() | m.IsNot() | m.In() | m.NotIn() | m.Equal())]
)


class Break(NamedTuple):
    """One small break of a source file.

    Attributes:
        path: the file.
        line: number of the first line that differs, from 1.
        before: that line.
        after: what stands there in the broken file.
        source: the whole broken file.
    """

    path: Path
    line: int
    before: str
    after: str
    source: str


class Piece(NamedTuple):
    """A break that is not written out yet: another node of the syntax tree."""

    path: Path
    module: cst.Module
    line: int
    node: cst.CSTNode
    other: cst.CSTNode

    def written_out(self) -> Break:
        broken = cst.ensure_type(self.module.deep_replace(self.node, self.other), cst.Module).code
        lines = zip(self.module.code.splitlines(), broken.splitlines(), strict=False)
        for number, (before, after) in enumerate(lines, start=1):
            if before != after:
                return Break(self.path, number, before.strip(), after.strip(), broken)
        raise AssertionError("a break changes its file")


def pieces_of(path: Path) -> list[Piece]:
    """Every break of a file."""
    wrapper = MetadataWrapper(cst.parse_module(path.read_text(encoding="utf-8")))
    visitor = _Visitor(path, wrapper.module)
    wrapper.visit(visitor)
    return visitor.found


class _Visitor(cst.CSTVisitor):
    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self, path: Path, module: cst.Module) -> None:
        super().__init__()
        self.path = path
        self.module = module
        self.found: list[Piece] = []

    def on_visit(self, node: cst.CSTNode) -> bool:
        if isinstance(node, cst.SimpleStatementLine):
            self._add(node, _without(node))
        if m.matches(node, _NOT_BROKEN):
            return False
        if m.matches(node, m.Call(m.Name("cast"))):
            cst.ensure_type(node, cst.Call).args[1].visit(self)
            return False
        if isinstance(node, cst.If) and not m.matches(node.test, _TURNED_ROUND_BY_MUTMUT):
            self._add(node, [node.with_changes(test=_turned_round(node.test))])
        if isinstance(node, cst.Call):
            self._add(node, _without_a_keyword(node))
        for kind, operator in _OPERATORS:
            if isinstance(node, kind):
                self._add(node, operator(node))
        return True

    def _add(self, node: cst.CSTNode, others: Iterable[cst.CSTNode]) -> None:
        place = self.get_metadata(PositionProvider, node, None)
        # operators like `<` have no place of their own; mutmut breaks the comparison around them
        if place is not None:
            line = place.start.line
            self.found += [Piece(self.path, self.module, line, node, other) for other in others]


def _without(line: cst.SimpleStatementLine) -> Iterator[cst.SimpleStatementLine]:
    (statement,) = line.body
    message = m.Expr(m.Call(m.Attribute(m.Name("logger") | m.Name("warnings"))))
    if m.matches(statement, _LEFT_OUT) and not m.matches(statement, message):
        yield line.with_changes(body=[cst.Pass()])


def _without_a_keyword(call: cst.Call) -> Iterator[cst.Call]:
    for argument in call.args:
        if argument.keyword is not None:
            yield call.with_changes(args=[other for other in call.args if other is not argument])


def _turned_round(test: cst.BaseExpression) -> cst.BaseExpression:
    parenthesized = test.with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()])
    return cst.UnaryOperation(cst.Not(), parenthesized)
