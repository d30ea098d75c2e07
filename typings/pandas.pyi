# pandas' own annotations reject most of its idioms (a boolean mask, a groupby): to pyright it is untyped.
from typing import Any

def __getattr__(name: str) -> Any: ...
