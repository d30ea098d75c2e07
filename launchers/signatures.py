"""What the classes and functions of a configuration take, read off their source: importing them would import torch."""

import ast
import builtins
import sys
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

Options = dict[str, Any]  # name -> annotation, Any where the source does not tell one that can be checked


def options(target: str) -> Options | None:
    """The options of a `_target_`: fields of a dataclass, or arguments. None where its source cannot be read, or takes
    any name."""
    module, _, name = target.rpartition(".")
    found = _definition(module, name)
    if found is None:
        return None
    source, node = found
    return source.arguments(node) if isinstance(node, ast.FunctionDef) else source.fields(node)


class Source(Mapping[str, Any]):
    """A module that is read, not run. As a mapping: what the names in its annotations mean."""

    def __init__(self, file: Path):
        body = ast.parse(file.read_text("utf-8")).body
        self.imports = {alias.asname or alias.name: (str(node.module), alias.name)
                        for node in body if isinstance(node, ast.ImportFrom) for alias in node.names}  # fmt: skip
        self.defined = {node.name: node for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
        self.aliases = {target.id: node.value for node in body if isinstance(node, ast.Assign)
                        for target in node.targets if isinstance(target, ast.Name)}  # fmt: skip

    def __getitem__(self, name: str) -> Any:
        if name in self.imports:
            module, original = self.imports[name]
            if module.partition(".")[0] in sys.stdlib_module_names:
                return getattr(import_module(module), original)
            source = read(module)
            return Any if source is None else source[original]
        if name in self.defined:
            return Mapping  # a part of the configuration, with a _target_ of its own
        return self.meaning(self.aliases[name]) if name in self.aliases else getattr(builtins, name)

    def __iter__(self):
        return iter({**self.imports, **self.defined, **self.aliases})

    def __len__(self) -> int:
        return len({**self.imports, **self.defined, **self.aliases})

    def meaning(self, annotation: ast.expr | None) -> Any:
        """The type that an annotation names; Any where it is of a library that is not loaded for this."""
        if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
            annotation = ast.parse(annotation.value, mode="eval").body
        try:
            return Any if annotation is None else eval(ast.unparse(annotation), {"__builtins__": {}}, self)
        except (NameError, KeyError, AttributeError, TypeError):
            return Any

    def arguments(self, function: ast.FunctionDef, bound: bool = False) -> Options | None:
        """Those of a function, without `self` of a `bound` one."""
        if function.args.kwarg is not None:
            return None
        taken = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs][int(bound) :]
        return {argument.arg: self.meaning(argument.annotation) for argument in taken}

    def fields(self, cls: ast.ClassDef) -> Options | None:
        """What a class is built from: the arguments of its `__init__`, or its fields with those of its bases."""
        for node in cls.body:
            if isinstance(node, ast.FunctionDef) and node.name == "__init__":
                return self.arguments(node, bound=True)
        inherited: Options = {}
        for base in cls.bases:
            found = self.origin(ast.unparse(base))
            if found is not None and isinstance(found[1], ast.ClassDef):
                inherited |= found[0].fields(found[1]) or {}
        if not any("dataclass" in ast.unparse(each) for each in cls.decorator_list):
            return inherited
        own = [node for node in cls.body if isinstance(node, ast.AnnAssign) and _is_field(node)]
        return inherited | {ast.unparse(node.target): self.meaning(node.annotation) for node in own}

    def origin(self, name: str) -> "tuple[Source, ast.ClassDef | ast.FunctionDef] | None":
        """Where a name of this module is defined."""
        if name in self.defined:
            return self, self.defined[name]
        return _definition(*self.imports[name]) if name in self.imports else None


@cache
def read(module: str) -> Source | None:
    """The source of a module by its name; None where it has none."""
    top, *inner = module.split(".")
    try:
        spec = find_spec(top)
    except (ValueError, ModuleNotFoundError):
        return None
    if spec is None or module.partition(".")[0] in sys.stdlib_module_names:
        return None
    if spec.submodule_search_locations is None:
        files = [Path(spec.origin)] if spec.origin and not inner else []
    else:
        path = Path(next(iter(spec.submodule_search_locations)), *inner)
        files = [path / "__init__.py", path.with_suffix(".py")]
    return next((Source(file) for file in files if file.is_file() and file.suffix == ".py"), None)


def _definition(module: str, name: str) -> tuple[Source, ast.ClassDef | ast.FunctionDef] | None:
    """A class or function, also where its package lends it from one of its modules."""
    source = read(module)
    if source is None:
        return None
    if (found := source.origin(name)) is not None:
        return found
    spec = find_spec(module.partition(".")[0])
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(folder, *module.split(".")[1:]).glob("*.py")):
            inner = read(f"{module}.{file.stem}")
            if inner is not None and name in inner.defined:
                return inner, inner.defined[name]
    return None


def _is_field(node: ast.AnnAssign) -> bool:
    """Whether a dataclass takes it when it is built."""
    written = ast.unparse(node.value) if node.value is not None else ""
    return "ClassVar" not in ast.unparse(node.annotation) and "init=False" not in written
