"""Recipes: one copy of each default, plain data out and in, paths relative to the file."""

import json
from dataclasses import dataclass, fields

import pytest
import yaml

from limbeck import Method
from limbeck.core import registry
from limbeck.core.errors import UsageError
from limbeck.core.optim import Optim
from limbeck.core.recipe import Recipe, descriptions, json_schema
from limbeck.engine.settings import Engine
from limbeck.methods.kd.method import KD

TREE = {"teacher": "timm:resnet50", "student": "timm:resnet18", "data": "digits", "method": "kd"}


@dataclass(frozen=True)
class Own(Method):
    weight: float = 2.0


def test_defaults_are_those_of_the_dataclasses():
    recipe = Recipe.parse(TREE)
    assert recipe.method == KD()
    assert recipe.engine == Engine()
    assert recipe.optim == {}


def test_numbers_and_lists_of_yaml_become_the_fields_types(tmp_path):
    (tmp_path / "r.yaml").write_text(
        "student: s\ndata: digits\nmethod: kd\nengine: {epochs: 3, compile: [student]}\n"
        "optim: {student: {lr: 1e-3, betas: [0.9, 0.98], lr_multipliers: {'head.*': 10}}}"
    )
    recipe = Recipe.load(tmp_path / "r.yaml")
    assert recipe.engine.epochs == 3.0
    assert recipe.engine.compile == ("student",)
    assert recipe.optim["student"] == Optim(lr=1e-3, betas=(0.9, 0.98), lr_multipliers={"head.*": 10.0})


def test_overrides_in_their_order():
    recipe = Recipe.parse(TREE, ["method.temperature=2", "engine.epochs=3", "engine.epochs=5", "optim.student.lr=1e-2"])
    assert recipe.method == KD(temperature=2.0)
    assert recipe.engine.epochs == 5
    assert recipe.optim["student"].lr == 0.01


def test_an_override_changes_the_method():
    recipe = Recipe.parse(TREE, ["method=pld"])
    assert registry.name_of(type(recipe.method)) == "pld"


def test_dump_parses_to_the_same_recipe():
    recipe = Recipe.parse({**TREE, "optim": {"student": {"name": "sgd"}}}, ["engine.trackers=[tensorboard]"])
    assert Recipe.parse(recipe.dump()) == recipe
    assert Recipe.parse(yaml.safe_load(recipe.yaml())) == recipe
    json.dumps(recipe.dump())


def test_dump_writes_every_field():
    dumped = Recipe.parse(TREE).dump()
    assert list(dumped["engine"]) == [f.name for f in fields(Engine)]
    assert dumped["method"] == {"name": "kd", **{f.name: f.default for f in fields(KD)}}


def test_a_method_object_is_kept_as_it_is():
    recipe = Recipe.parse({**TREE, "method": Own(weight=3.0)})
    assert recipe.method == Own(weight=3.0)
    assert recipe.dump()["method"]["weight"] == 3.0
    assert recipe.dump()["method"]["name"].endswith("test_recipe.py:Own")


def test_paths_are_relative_to_the_file(tmp_path, monkeypatch):
    folder = tmp_path / "recipes"
    (folder / "images").mkdir(parents=True)
    (folder / "own.py").write_text(
        "from dataclasses import dataclass\nfrom limbeck import Method\n"
        "@dataclass(frozen=True)\nclass Own(Method):\n    weight: float = 1.0\n"
    )
    (folder / "teacher").mkdir()
    (folder / "w").mkdir()
    (folder / "w" / "teacher.pt").touch()
    recipe = {
        "teacher": ["st:teacher", "hf:org/name", "own.py:build@w/teacher.pt"],
        "student": "timm:resnet18@here.pt",
        "data": {"spec": "images", "image_size": 32},
        "method": "own.py:Own",
        "cache": "cache",
        "out": "../run",
    }
    (folder / "r.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.chdir(tmp_path)
    found = Recipe.load("recipes/r.yaml", ["out=here"])
    assert found.teacher == ["st:recipes/teacher", "hf:org/name", "recipes/own.py:build@recipes/w/teacher.pt"]
    assert found.student == "timm:resnet18@here.pt"  # not beside the recipe, so where the command is given
    assert found.data == {"spec": "recipes/images", "image_size": 32}
    assert found.cache == "recipes/cache"
    assert found.out == "here"
    assert registry.name_of(type(found.method)).endswith("recipes/own.py:Own")


def test_errors_name_all_places():
    with pytest.raises(UsageError) as caught:
        Recipe.parse({**TREE, "engine": {"epochs": "x", "steps": "y"}, "optim": {"student": {"lr": "z"}}})
    assert caught.value.where == "engine.epochs"
    assert "engine.steps, optim.student.lr" in caught.value.fix


def test_a_dataclass_error_names_the_file(tmp_path):
    (tmp_path / "r.yaml").write_text("student: s\ndata: digits\nmethod: {name: kd, temperature: -1.0}\n")
    with pytest.raises(UsageError) as caught:
        Recipe.load(tmp_path / "r.yaml")
    assert caught.value.where == f"{tmp_path / 'r.yaml'}: method.temperature"


def test_schema_has_every_field_with_its_description():
    schema = json_schema()
    assert schema["properties"]["teacher"]["description"]
    engine = schema["$defs"]["Engine"]
    assert set(engine["properties"]) == {f.name for f in fields(Engine)}
    assert engine["additionalProperties"] is False
    for kind, name in ((Engine, "Engine"), (Optim, "Optim"), (KD, "kd")):
        for field in fields(kind):
            assert schema["$defs"][name]["properties"][field.name]["description"], field.name
    names = {
        method["$ref"].rpartition("/")[2] for method in schema["properties"]["method"]["anyOf"] if "$ref" in method
    }
    assert names == set(registry.METHODS)


def test_schema_accepts_what_parse_accepts():
    jsonschema = pytest.importorskip("jsonschema")
    schema = json_schema()
    jsonschema.validate(Recipe.parse(TREE).dump(), schema)
    jsonschema.validate(TREE, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**TREE, "engine": {"epoch": 3}}, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**TREE, "method": {"name": "kd", "temprature": 3}}, schema)


def test_descriptions_of_several_lines():
    assert descriptions(Recipe)["cache"].endswith("None runs the teacher in every step.")


def test_only_what_names_a_file_is_looked_for_beside_the_recipe(tmp_path):
    """Folders that happen to have the name of a method, a column or a class change nothing."""
    for name in ("kd", "label", "cat"):
        (tmp_path / name).mkdir()
    (tmp_path / "pool").mkdir()
    (tmp_path / "r.yaml").write_text(
        "student: s\nmethod: {name: kd}\ndata: {spec: digits, label: label, classes: [cat, dog], unlabelled: pool}"
    )
    recipe = Recipe.load(tmp_path / "r.yaml")
    assert isinstance(recipe.method, KD)
    assert recipe.data == {
        "spec": "digits", "label": "label", "classes": ["cat", "dog"], "unlabelled": str(tmp_path / "pool")
    }  # fmt: skip
