"""Values that cannot be printed: tokens and keys pass through the program inside this."""

from __future__ import annotations

from typing import Generic, NoReturn, TypeVar

T = TypeVar("T")


class Secret(Generic[T]):
    """Holds one string or bytes. Only `reveal()` gives it back; repr, str, format, pickle and comparison do not."""

    __slots__ = ("_value",)

    def __init__(self, value: T) -> None:
        self._value = value

    def reveal(self) -> T:
        return self._value

    def __repr__(self) -> str:
        return "Secret(**)"

    __str__ = __repr__

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret is not pickled")

    def __eq__(self, other: object) -> NoReturn:
        raise TypeError("secrets are compared by hmac.compare_digest")

    __hash__ = None  # type: ignore[assignment]  # a secret is no dictionary key
