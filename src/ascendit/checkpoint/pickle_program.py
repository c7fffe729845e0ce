"""Evaluate a pickle as data: dicts, lists, tuples and scalars, and calls of functions in a table.

A pickle is a program for a stack machine. Python's own machine imports every name in the program, and
allocates memory as the program asks. This one knows the operations that build data, calls nothing outside the
table of its caller, never recurses, and stops after `MAX_OPERATIONS`. Python's `pickletools` parses them.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from typing import Any

MAX_OPERATIONS = 500_000
"""Operations of one pickle. A Wan model has 1,100 tensors of about 40 operations each."""
_MAX_ARGUMENTS = 16

Call = Callable[..., Any]


class Opaque:
    """A value without meaning for tensors, such as a set or a device."""


class PickleDataError(ValueError):
    """The reason why a pickle cannot be read as data."""


class ConvertibleError(PickleDataError):
    """A problem that PyTorch has not: it reads the file."""


class UnknownGlobalError(PickleDataError):
    """The pickle names a class or function that is not in the table: `module.name`."""


def evaluate(data: bytes, calls: Mapping[str, Call], persistent: Call) -> Any:
    """Return the value of a pickle of protocol 0 to 5.

    `calls`: `module.name` -> function of the arguments in the pickle. `persistent`: function of a persistent
    id. Raises PickleDataError for a damaged pickle and for operations that build no data, UnknownGlobalError
    for names that are not in `calls`.
    """
    machine = _Machine(calls, persistent)
    try:
        for count, (operation, argument, _) in enumerate(pickletools.genops(data)):
            if count == MAX_OPERATIONS:
                raise PickleDataError(f"more than {MAX_OPERATIONS:,} operations")
            if operation.name == "STOP":
                break
            if (run := _OPERATIONS.get(operation.name)) is None:
                raise PickleDataError(f"the operation {operation.name}, which builds no tensors")
            run(machine, argument)
        return machine.stack.pop()
    except PickleDataError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as e:
        raise PickleDataError(f"damaged ({type(e).__name__})") from e


class _Machine:
    """The stack, the memo, and the stacks below the marks."""

    def __init__(self, calls: Mapping[str, Call], persistent: Call) -> None:
        self.calls, self.persistent = calls, persistent
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def mark(self, _: object) -> None:
        self.below.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def pop(self, _: object) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.since_mark()

    def remember(self, index: int | None) -> None:
        self.memo[len(self.memo) if index is None else index] = self.stack[-1]

    def recall(self, index: int) -> None:
        self.push(self.memo[index])

    def tuple_of(self, count: int) -> None:
        items = self.stack[len(self.stack) - count :]
        if len(items) != count:
            raise IndexError
        del self.stack[len(self.stack) - count :]
        self.push(tuple(items))

    def extend(self, items: list[Any]) -> None:
        if type(target := self.stack[-1]) is not list:
            raise TypeError
        target.extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise TypeError
        for key, value in zip(items[::2], items[1::2], strict=True):
            _check_key(key)
            if key in target:
                raise PickleDataError(f"the key {key!r:.80} twice in one dict")
            target[key] = value

    def look_up(self, module: object, name: object) -> None:
        if type(module) is not str or type(name) is not str:
            raise TypeError
        known_as = f"{module.replace('__builtin__', 'builtins')}.{name}"
        if known_as not in self.calls:
            raise UnknownGlobalError(known_as)
        self.push(self.calls[known_as])

    def call(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        # Only functions of the table are callable; a pickle builds none itself.
        if type(arguments) is not tuple or len(arguments) > _MAX_ARGUMENTS or not callable(function):
            raise TypeError
        self.push(function(*arguments))

    def set_state(self) -> None:
        """Attributes of an object, which no tensor needs: `_metadata` of a state dict."""
        self.stack.pop()
        if isinstance(self.stack[-1], str | bytes | int | float | tuple | list | type(None)):
            raise TypeError


def _check_key(key: object) -> None:
    """Allow only keys with a bounded hash: a nested tuple exhausts the stack, a long integer takes time."""
    if type(key) is int and key.bit_length() > 64:
        raise PickleDataError("a dict with an integer of more than 64 bits as a key")
    if not isinstance(key, str | int | float | bytes | None):
        raise PickleDataError(f"a dict with a key of type {type(key).__name__}")


def _two(machine: _Machine) -> list[Any]:
    value, key = machine.stack.pop(), machine.stack.pop()
    return [key, value]


def _global(machine: _Machine, argument: str) -> None:
    machine.look_up(*argument.split(" ", 1))


def _instance(machine: _Machine, argument: str) -> None:
    _global(machine, argument)
    raise PickleDataError(f"an instance of {argument:.80}")


def _stack_global(machine: _Machine, _: object) -> None:
    machine.look_up(*_two(machine))


def _protocol(machine: _Machine, number: int) -> None:
    if number > 5:
        raise PickleDataError(f"protocol {number}")


def _dict_since_mark(machine: _Machine, _: object) -> None:
    items = machine.since_mark()
    machine.push({})
    machine.set_items(items)


def _opaque_since_mark(machine: _Machine, _: object) -> None:
    machine.since_mark()
    machine.push(Opaque())


_LITERALS = (
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
)
_REMEMBER = tuple(operation.name for operation in pickletools.opcodes if operation.code in "pqr\x94")
"""Operations that write the top of the stack to the memo."""
_OPERATIONS: dict[str, Callable[[_Machine, Any], object]] = {
    **dict.fromkeys(_LITERALS, _Machine.push),
    "PROTO": _protocol,
    "FRAME": lambda m, _: None,
    "NONE": lambda m, _: m.push(None),
    "NEWTRUE": lambda m, _: m.push(True),
    "NEWFALSE": lambda m, _: m.push(False),
    "MARK": _Machine.mark,
    "POP": _Machine.pop,
    "POP_MARK": lambda m, _: m.since_mark(),
    "DUP": lambda m, _: m.push(m.stack[-1]),
    **dict.fromkeys(_REMEMBER, _Machine.remember),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.recall),
    "EMPTY_TUPLE": lambda m, _: m.push(()),
    "TUPLE": lambda m, _: m.push(tuple(m.since_mark())),
    "TUPLE1": lambda m, _: m.tuple_of(1),
    "TUPLE2": lambda m, _: m.tuple_of(2),
    "TUPLE3": lambda m, _: m.tuple_of(3),
    "EMPTY_LIST": lambda m, _: m.push([]),
    "LIST": lambda m, _: m.push(m.since_mark()),
    "APPEND": lambda m, _: m.extend([m.stack.pop()]),
    "APPENDS": lambda m, _: m.extend(m.since_mark()),
    "EMPTY_DICT": lambda m, _: m.push({}),
    "DICT": _dict_since_mark,
    "SETITEM": lambda m, _: m.set_items(_two(m)),
    "SETITEMS": lambda m, _: m.set_items(m.since_mark()),
    "EMPTY_SET": lambda m, _: m.push(Opaque()),
    "FROZENSET": _opaque_since_mark,
    "ADDITEMS": lambda m, _: m.since_mark(),
    "GLOBAL": _global,
    "INST": _instance,
    "STACK_GLOBAL": _stack_global,
    "REDUCE": lambda m, _: m.call(),
    "BUILD": lambda m, _: m.set_state(),
    "BINPERSID": lambda m, _: m.push(m.persistent(m.stack.pop())),
}
"""Operation -> its effect. Absent: those that make objects of other classes, and those of other programs."""
