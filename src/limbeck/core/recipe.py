"""Recipes: one run as plain data, validated from the dataclasses of the method, the engine and the optimizers."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from limbeck.core import registry
from limbeck.core.errors import UsageError
from limbeck.core.method import Method
from limbeck.core.optim import Optim
from limbeck.engine.settings import Engine


class Recipe(BaseModel):
    """One run: what is distilled into what, on which data, how.

    Args:
        teacher: What is distilled, such as `timm:resnet50`; a list makes an ensemble, None is for methods without one.
        student: What is trained, such as `timm:resnet18`, `layers:2`, `file.py:function` or a student's folder.
        pretrained: Whether a student of a library starts from the library's trained weights, or from random ones.
        data: A data set by name, file or folder; or a mapping with `spec` and the options of `load_data`.
        method: The method and its hyper-parameters: `name`, and the fields of its dataclass.
        engine: How the run is executed.
        optim: How each role is optimised, by role.
        cache: A folder for the teacher's outputs on the training data, which then stand in for the teacher; made once,
            checked and read by later runs. None runs the teacher in every step.
        out: The run's folder; None chooses `runs/METHOD-STUDENT`.

    Example:
        >>> recipe = Recipe.parse({"student": "layers:2", "data": "docstrings", "method": "kd"}, ["method.temperature=2"])
        >>> recipe.method.temperature, recipe.engine.batch_size
        (2.0, 64)
        >>> Recipe.parse(recipe.dump()) == recipe
        True
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, arbitrary_types_allowed=True)

    teacher: str | list[str] | None = None
    student: str
    pretrained: bool = True
    data: str | dict[str, Any]
    method: Any
    engine: Engine = Field(default_factory=Engine)
    optim: dict[str, Optim] = Field(default_factory=dict)
    cache: str | None = None
    out: str | None = None

    @classmethod
    def load(cls, path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
        """Read a recipe from a YAML file.

        Args:
            path: The file; the relative paths in it are relative to its folder.
            overrides: `field.path=value`, with the value in YAML; the relative paths here are relative to the working folder.

        Raises:
            UsageError: No such file, not YAML, or a field that does not fit; names the field and what was expected.
        """
        path = Path(path)
        try:
            tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
        except OSError as error:
            raise UsageError(
                "this recipe cannot be read",
                where=path,
                found=error.strerror,
                fix="limbeck new NAME writes one to start from",
            ) from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UsageError("this is not YAML", where=path, found=_yaml_problem(error)) from None
        if not isinstance(tree, dict):
            raise UsageError(
                "this is not a recipe",
                where=path,
                found=type(tree).__name__,
                expected="a mapping with student, data and method",
            )
        return cls.parse(_resolve(tree, path.parent), overrides, where=str(path))

    @classmethod
    def parse(cls, tree: Mapping[str, Any], overrides: Iterable[str] = (), where: str = "") -> Recipe:
        """A recipe from plain data.

        Args:
            tree: What a recipe file holds; `method` may be a method object too.
            overrides: `field.path=value`, with the value in YAML.
            where: The file, for messages.

        Raises:
            UsageError: A field that does not fit.
        """
        own = tree["method"] if isinstance(tree.get("method"), Method) else None
        fields = json.loads(json.dumps({**tree, "method": None} if own else tree, default=str))
        model: type[Recipe] = Recipe
        try:
            for override in overrides:
                _override(fields, override)
            if own is None:
                model, fields = _with_method(fields)
            valid = dict(model.model_validate_json(json.dumps(fields)))
            _check_spec(valid["data"])
            return cls.model_construct(**valid | ({"method": own} if own else {}))
        except ValidationError as error:
            raise _explain(error, model, where) from None
        except UsageError as error:  # raised without the file's name, by a dataclass say
            place = _place(where, str(error.where or "")) or None
            raise UsageError(
                error.what, where=place, found=error.found, expected=error.expected, fix=error.fix
            ) from None

    def dump(self) -> dict[str, Any]:
        """Plain data with every field written out; `parse` takes it back."""
        tree = {name: plain(getattr(self, name)) for name in type(self).model_fields}
        return tree | {"method": {"name": registry.name_of(type(self.method)), **tree["method"]}}

    def yaml(self) -> str:
        """The recipe as a YAML file."""
        return yaml.safe_dump(self.dump(), sort_keys=False, allow_unicode=True)


def json_schema() -> dict[str, Any]:
    """The JSON schema of recipe files, for editors: every field of every method with its description.

    Example:
        >>> sorted(json_schema()["properties"])
        ['cache', 'data', 'engine', 'method', 'optim', 'out', 'pretrained', 'student', 'teacher']
    """
    methods: list[dict[str, str]] = []
    definitions: dict[str, Any] = {}
    schema: dict[str, Any] = {}
    for name in registry.METHODS:
        method = registry.find(name)
        schema = _model(method).model_json_schema()
        definitions |= schema.pop("$defs")
        own = definitions.pop(method.__name__)
        own["properties"] = {"name": {"const": name}, **_describe(method, own["properties"])}
        own["required"] = ["name", *own.get("required", [])]
        definitions[name] = own
        methods.append({"$ref": f"#/$defs/{name}"})
    for kind in (Engine, Optim):
        _describe(kind, definitions[kind.__name__]["properties"])
    _describe(Recipe, schema["properties"])
    own_file = {"type": "object", "properties": {"name": {"pattern": r"\.py:\w+$"}}, "required": ["name"]}
    schema["properties"]["method"] = {"anyOf": [{"enum": list(registry.METHODS)}, *methods, own_file]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$defs": definitions, **schema}


def plain(value: Any) -> Any:
    """Dataclasses, mappings and tuples as dictionaries and lists.

    Example:
        >>> plain({"student": Optim()})["student"]["betas"]
        [0.9, 0.999]
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value


def descriptions(kind: type) -> dict[str, str]:
    """What a class's docstring says of each field, by name.

    Example:
        >>> descriptions(Optim)["lr"]
        'Peak learning rate, > 0.'
    """
    _, _, args = (inspect.getdoc(kind) or "").partition("Args:\n")
    block = re.split(r"\n(?=\S)", args)[0]
    items = re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", block, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in items}


_WORDS = {
    "float_type": "a number",
    "int_type": "a whole number",
    "bool_type": "true or false",
    "string_type": "a string",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "dataclass_type": "a mapping",
}


class _Loader(yaml.SafeLoader):
    """Safe YAML in which `1e-3` is a number and a field given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the field '{key.value}' is given twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _model(kind: type) -> type[Recipe]:
    return create_model("Recipe", __base__=Recipe, method=(kind, ...))


def _with_method(tree: dict[str, Any]) -> tuple[type[Recipe], dict[str, Any]]:
    """The model for the method that the tree names, and the tree without that name."""
    block = tree.get("method")
    block = {"name": block} if isinstance(block, str) else block
    if not isinstance(block, dict) or not isinstance(block.get("name"), str):
        raise UsageError(
            "the recipe names no method",
            where="method",
            found=block,
            expected="a name that limbeck methods lists, or a mapping with name and the method's fields",
        )
    fields = {k: v for k, v in block.items() if k != "name"}
    return _model(registry.find(block["name"])), tree | {"method": fields}


def _check_spec(data: str | dict[str, Any]) -> None:
    if isinstance(data, dict) and not isinstance(data.get("spec"), str):
        raise UsageError(
            "the recipe names no data",
            where="data.spec",
            found=data.get("spec"),
            expected="a name, file or folder beside the options",
            fix="add spec: path/to/data",
        )


def _override(tree: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    names = path.split(".")
    if not equals or not all(names):
        raise UsageError(
            "this is not an override", found=override, expected="field.path=value, such as engine.epochs=3"
        )
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise UsageError("the value of an override is not YAML", where=path, found=_yaml_problem(error)) from None
    for name in names[:-1]:
        below = tree.setdefault(name, {})
        if name in ("method", "data") and isinstance(below, str):
            below = tree[name] = {"name" if name == "method" else "spec": below}
        if not isinstance(below, dict):
            raise UsageError("an override goes into something that has no fields", where=path, found=below)
        tree = below
    tree[names[-1]] = json.loads(json.dumps(value, default=str))


def resolve_data(data: Any, folder: Path) -> Any:
    """The data of a recipe in a folder, with what names a file beside it replaced by its path."""
    if isinstance(data, dict):  # other options are names of columns and classes
        return data | {
            name: _located(data[name], folder) for name in ("spec", "unlabelled", "held_out") if name in data
        }
    return _located(data, folder)


def _resolve(tree: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The tree with what names a file beside the recipe replaced by its path."""
    tree = tree | {name: _located(tree[name], folder) for name in ("teacher", "student") if name in tree}
    tree |= {name: str(folder / tree[name]) for name in ("cache", "out") if isinstance(tree.get(name), str)}
    if "data" in tree:
        tree["data"] = resolve_data(tree["data"], folder)
    block = tree.get("method")
    if isinstance(block, str) and ".py:" in block:
        tree["method"] = _path(block, folder)
    elif isinstance(block, dict) and ".py:" in str(block.get("name")):
        tree["method"] = block | {"name": _path(block["name"], folder)}
    return tree


def _located(value: Any, folder: Path) -> Any:
    if isinstance(value, str):
        return _path(value, folder)
    if isinstance(value, list):
        return [_located(v, folder) for v in value]
    return {k: _located(v, folder) for k, v in value.items()} if isinstance(value, dict) else value


def _path(spec: str, folder: Path) -> str:
    """A spec, with the file that it names beside the recipe as a path."""
    base, at, weights = spec.rpartition("@")
    if at and weights.endswith((".safetensors", ".pt", ".pth")):
        return f"{_path(base, folder)}@{folder / weights if (folder / weights).exists() else weights}"
    scheme, colon, rest = spec.partition(":")
    if colon and re.fullmatch(r"[a-z]+", scheme):
        return f"{scheme}:{folder / rest}" if (folder / rest).exists() else spec
    file, colon, name = spec.rpartition(":") if ".py:" in spec else (spec, "", "")
    beside, below = (folder / file).exists(), Path(file).exists()  # a run's own recipe names files from where it began
    return f"{folder / file}{colon}{name}" if beside or ("/" in file and not below) else spec


def _explain(error: ValidationError, model: type[Recipe], where: str) -> UsageError:
    """The first problem in full, and the places of the others."""
    problems: dict[str, list[Any]] = {}
    for item in error.errors():
        problems.setdefault(".".join(_walk(model, item["loc"])[0]), []).append(item)
    (path, items), *others = problems.items()
    first = items[0]
    also = f"; then mend {', '.join(p for p, _ in others)} too" if others else ""
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        name = path.rpartition(".")[2]
        names = list(_hints(_walk(model, first["loc"][:-1])[1]))
        near = get_close_matches(name, names, n=3, cutoff=0.5)
        return UsageError(
            "unknown field",
            where=_place(where, path),
            found=name,
            expected=" or ".join(near) if near else f"one of {', '.join(names)}",
            fix=f"rename or remove it{also}",
        )
    if first["type"] in ("missing", "missing_argument"):
        return UsageError("a field is missing", where=_place(where, path), expected=path, fix=f"add it{also}")
    expected = " or ".join(
        dict.fromkeys(_WORDS.get(i["type"], i["msg"].removeprefix("Input should be ")) for i in items)
    )
    found = f"{first['input']!r} ({type(first['input']).__name__})"
    fix = f"change it{also}"
    return UsageError("a field has the wrong value", where=_place(where, path), found=found, expected=expected, fix=fix)


def _walk(kind: Any, loc: Iterable[Any]) -> tuple[list[str], Any]:
    """The part of a place in an error that the user wrote, and the type there; unions add parts of their own."""
    path: list[str] = []
    for part in loc:
        hints = _hints(kind)
        if part in hints:
            kind = hints[part]
        elif get_origin(kind) in (dict, Mapping) and isinstance(part, str):
            kind = get_args(kind)[1]
        elif hints or get_origin(kind) in (list, tuple):
            kind = None
        else:
            break
        path.append(str(part))
    return path, kind


def _hints(kind: Any) -> dict[str, Any]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return {name: f.annotation for name, f in kind.model_fields.items()}
    if dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        return {f.name: hints[f.name] for f in dataclasses.fields(kind)}
    return {}


def _describe(kind: type, properties: dict[str, Any]) -> dict[str, Any]:
    for name, text in descriptions(kind).items():
        if name in properties:
            properties[name]["description"] = text
    return properties


def _place(where: str, path: str) -> str:
    return ": ".join(filter(None, [where, path]))


def _yaml_problem(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    return f"{getattr(error, 'problem', None) or error}{place}"
