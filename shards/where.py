"""Conditions on samples, such as ``min(width, height) >= 96 and class_name != "none"``, over the columns of an index."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_train.errors import ConfigError
from shards.index import UNLABELED, Index

COLUMNS = ("width", "height", "bytes", "class_name", "labeled", "key")
_EXAMPLE = 'such as min(width, height) >= 96 and class_name in ["cat", "dog"]'

_BINARY: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: np.isin,
    ast.NotIn: lambda value, among: np.isin(value, among, invert=True),
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {"min": np.minimum, "max": np.maximum}


def select(index: Index, condition: str) -> NDArray[np.int64]:
    """Ids of the samples for which a condition holds, rising, int64.

    The condition is an expression in Python's syntax: comparisons, ``in``, ``and``, ``or``, ``not``, ``+ - * /``, ``min``
    and ``max`` of numbers, texts and the columns ``width``, ``height`` (pixels), ``bytes`` (of the encoded image),
    ``class_name`` (empty without a label), ``labeled`` and ``key``.  Nothing else of it is Python: it is read, not run.

    Raises:
        ConfigError: it cannot be read, or is no condition.
    """
    try:
        tree = ast.parse(condition.strip(), mode="eval").body
        # A division by 0 gives infinity or NaN, with which a comparison is simply true or false.
        with np.errstate(all="ignore"):
            chosen = np.asarray(_value(tree, index))
    except (SyntaxError, ValueError, TypeError, ArithmeticError, RecursionError, MemoryError) as error:
        raise ConfigError(f"where is {condition!r}: {_reason(error)}; give a condition {_EXAMPLE}") from None
    if chosen.dtype != np.bool_ or chosen.shape != (len(index),):
        raise ConfigError(f"where is {condition!r}, which is no condition on samples; give one {_EXAMPLE}")
    return np.flatnonzero(chosen)


def _value(node: ast.AST, index: Index) -> Any:
    """What an expression comes to: a column with a value per sample, or a constant."""

    def value(part: ast.AST) -> Any:
        return _value(part, index)

    match node:
        case ast.Constant(value=bool() | int() | float() | str() as constant):
            return constant
        case ast.List(elts=elements) | ast.Tuple(elts=elements):
            return [value(element) for element in elements]
        case ast.Name(id=name) if name in COLUMNS:
            return _column(index, name)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _BINARY[type(op)](*_numbers(value(left), value(right)))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -value(operand)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return ~_truth(value(operand))
        case ast.BoolOp(op=op, values=parts):
            combine = np.logical_and if isinstance(op, ast.And) else np.logical_or
            return reduce(combine, [_truth(value(part)) for part in parts])
        case ast.Compare(left=left, ops=ops, comparators=comparators):
            return _compare([value(part) for part in (left, *comparators)], ops)
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in _FUNCTIONS and arguments:
            return reduce(_FUNCTIONS[name], _numbers(*(value(argument) for argument in arguments)))
    raise ValueError(f"{ast.unparse(node)!r} is not known; there are {', '.join(COLUMNS)}, {', '.join(_FUNCTIONS)}")


def _compare(values: Sequence[Any], operators: Sequence[ast.cmpop]) -> Any:
    results = []
    for left, operation, right in zip(values, operators, values[1:]):
        if type(operation) not in _BINARY:
            raise ValueError("'is' is not known; compare with ==")
        if isinstance(operation, ast.In | ast.NotIn) and not isinstance(right, list):
            raise ValueError('in takes a list, such as ["cat", "dog"]')
        # numpy compares a text with a number without a word, and finds nothing equal.
        sides = [value for side in (left, right) for value in (side if isinstance(side, list) else [side])]
        kinds = {np.asarray(value).dtype.kind == "U" for value in sides}
        if len(kinds) > 1:
            raise ValueError("a text is compared with a number")
        results.append(_BINARY[type(operation)](left, right))
    return reduce(np.logical_and, results)


def _numbers(*values: Any) -> Sequence[Any]:
    if any(np.asarray(value).dtype.kind not in "if" for value in values):
        raise ValueError("+ - * /, min and max take numbers")
    return values


def _truth(value: Any) -> NDArray[np.bool_]:
    found = np.asarray(value)
    if found.dtype != np.bool_:
        raise ValueError("and, or and not take conditions")
    return found


def _column(index: Index, name: str) -> NDArray[Any]:
    column: NDArray[Any]
    if name == "bytes":
        column = index.size
    elif name == "key":
        column = np.char.decode(index.key, "utf-8", "replace")  # a key may be of any bytes
    elif name == "labeled":
        column = index.label != UNLABELED
    elif name == "class_name":
        # A name more than there are classes, for what has none.
        place = np.where(index.label == UNLABELED, len(index.classes), index.label)
        column = np.array([*index.classes, ""])[place]
    else:
        # Wider than they are stored: the area of a large photo times a factor does not fit into 32 bits.
        column = getattr(index, name).astype(np.int64)
    return column


def _reason(error: Exception) -> str:
    return f"is not an expression ({error.msg})" if isinstance(error, SyntaxError) else str(error)
