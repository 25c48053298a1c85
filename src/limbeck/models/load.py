"""`load_model`: from a name, a file or a folder to a module."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from torch import nn

from limbeck.convert.subclasses import SubclassHead
from limbeck.core.errors import LimbeckError, UsageError, require
from limbeck.data.images import Normalise
from limbeck.export import safetensors
from limbeck.models.specs import SCHEMES, import_object, is_object
from limbeck.models.state import read_state

_FORMS = "timm:NAME, torchvision:NAME, hf:NAME, st:NAME, layers:N, static, file.py:function, package.module:function, a folder"
_WEIGHTS = re.compile(r"(.+)@(.+\.(?:safetensors|pt|pth))$")


def load_model(
    spec: str | Path | nn.Module,
    *,
    num_classes: int | None = None,
    teacher: nn.Module | None = None,
    pretrained: bool = True,
) -> nn.Module:
    """A model from what names it; a module is returned as it is.

    Args:
        spec: `timm:NAME`, `torchvision:NAME`, `hf:NAME-or-folder` (transformers), `st:NAME-or-folder`
            (sentence-transformers), `layers:N` or `layers:0,2,4` (some of the teacher's layers), `static` (an average of
            token vectors, made from a teacher that is a sentence encoder), `file.py:function` or
            `package.module:function`, or the folder of a saved model. `@FILE` after the name of timm, torchvision or a
            function fills it with the weights of a `.safetensors`, `.pt` or `.pth` file.
        num_classes: Outputs of the classifier; None keeps the model's own. Functions get it where they have a parameter of
            that name; `teacher` too.
        teacher: What `layers:N` and `static` start from; it is not changed.
        pretrained: Whether the library's trained weights are loaded; False gives random ones and needs no network.

    Raises:
        UsageError: Unknown name, missing file, weights that cannot be downloaded or do not fit; says which.

    Example:
        >>> load_model(nn.Linear(2, 3))
        Linear(in_features=2, out_features=3, bias=True)
    """
    if isinstance(spec, nn.Module):
        return spec
    spec = str(spec)
    if (change := conversion(spec)) is not None:
        if teacher is None:
            raise UsageError(
                f"'{spec}' is made from a teacher, and there is none", where="student", fix="name a teacher"
            )
        return change(teacher)[0]
    kind, _, name = spec.partition(":")
    if kind == "st" and name:
        return _encoder(name, pretrained)
    if kind == "hf" and name:
        return _transformers(name, num_classes, pretrained)
    plain, weights = found.groups() if (found := _WEIGHTS.match(spec)) else (spec, "")
    plain_kind, _, plain_name = plain.partition(":")
    if plain_kind in ("timm", "torchvision") and plain_name:
        make = _timm if plain_kind == "timm" else _torchvision
        module = make(plain_name, num_classes, pretrained and not weights)
    elif is_object(plain):
        module = _own(plain, {"num_classes": num_classes, "teacher": teacher})
    elif Path(spec).expanduser().is_dir():
        from limbeck.models.folder import load_folder

        return load_folder(Path(spec).expanduser())
    else:
        raise _unknown(spec)
    return _fill(module, Path(weights).expanduser()) if weights else module


def conversion(spec: str) -> Callable[[nn.Module], tuple[nn.Module, dict[str, Any]]] | None:
    """The conversion of a teacher that a spec stands for; None for other specs.

    `layers:N` and `layers:0,2,4` keep some layers, `slice:width=192,*.ffn=0.5` the leading units of some dimensions (see
    `limbeck.convert.structure`), `copy` everything, `static` the token embeddings.

    Example:
        >>> conversion("layers:2"), conversion("timm:resnet18")
        (InheritLayers(layers=2, rule='even', path=None), None)
    """
    if spec == "static":
        from limbeck.convert.static import StaticTokens

        return StaticTokens()
    if spec == "copy" or spec.startswith("slice:"):
        from limbeck.convert.slicing import Slice

        return Slice({} if spec == "copy" else _parts(spec))
    if not spec.startswith("layers:"):
        return None
    from limbeck.convert.layers import InheritLayers

    given = spec.removeprefix("layers:")
    if not re.fullmatch(r"\d+(,\d+)*,?", given):
        expected = "layers:N, or indices such as layers:0,2,4"
        raise UsageError("these layers are not understood", where="student", found=spec, expected=expected)
    numbers = [int(n) for n in given.split(",") if n]
    return InheritLayers(numbers if "," in given else numbers[0])


def _parts(spec: str) -> dict[str, float]:
    """What `slice:NAME=SIZE,...` keeps: numbers of units, and shares below 1."""
    found: dict[str, float] = {}
    for item in spec.removeprefix("slice:").split(","):
        name, _, value = item.partition("=")
        if not name or not re.fullmatch(r"\d+|0?\.\d+", value):
            expected = "slice:NAME=NUMBER,..., such as slice:width=192,*.ffn=0.5"
            raise UsageError("this part of a model is not understood", where="student", found=item, expected=expected)
        found[name] = float(value) if "." in value else int(value)
    return found


def num_classes(module: nn.Module) -> int | None:
    """How many classes a model tells apart: what it says itself, else the outputs of its last linear or convolution layer.

    Returns:
        None for encoders without a classifier, and where there is no such layer.

    Example:
        >>> num_classes(nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3)))
        3
    """
    if isinstance(own := getattr(module, "num_classes", None), int):
        return own or None
    if hasattr(module, "tokenize") or type(module).__name__ == "SentenceTransformer":
        return None
    if (config := getattr(module, "config", None)) is not None and hasattr(config, "num_labels"):
        return int(config.num_labels) if "Classification" in type(module).__name__ else None
    if own := [m.num_classes for m in module.modules() if isinstance(m, SubclassHead)]:
        return own[-1]
    layers = [m for m in module.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    last = layers[-1] if layers else None
    return last.out_features if isinstance(last, nn.Linear) else last.out_channels if last is not None else None


def model_preprocess(module: nn.Module) -> Normalise | None:
    """What a model wants done to images in [0, 1] first: its own normalisation; None for models that name none.

    Example:
        >>> model_preprocess(nn.Linear(2, 2)) is None
        True
    """
    config = getattr(module, "pretrained_cfg", None)
    if not isinstance(config, Mapping) or not config.get("mean") or not config.get("std"):
        return None
    mean, std = (tuple(float(v) for v in config[key]) for key in ("mean", "std"))
    return None if set(mean) == {0.0} and set(std) == {1.0} else Normalise(mean, std)


def model_image_size(module: nn.Module) -> int | None:
    """Pixels of a side of the images that a model was made for; None where it names none."""
    config = getattr(module, "pretrained_cfg", None)
    if isinstance(config, Mapping) and config.get("input_size"):
        return int(config["input_size"][-1])
    size = getattr(getattr(module, "config", None), "image_size", None)
    return int(size) if isinstance(size, int) else None


def model_tokenizer(module: nn.Module) -> Callable[..., Any] | None:
    """The tokenizer that belongs to a model of texts; None for other models."""
    own = getattr(module, "tokenize", None) or getattr(module, "tokenizer", None)
    if callable(own):
        return own
    config = getattr(module, "config", None)
    if not hasattr(config, "vocab_size") or not (path := getattr(config, "_name_or_path", "")):
        return None
    tokenizer = require("transformers", extra="language").AutoTokenizer
    with _fetching(f"the tokenizer of {path}"):
        return tokenizer.from_pretrained(path, trust_remote_code=False)


def _timm(name: str, classes: int | None, pretrained: bool) -> nn.Module:
    timm = require("timm", extra="vision")
    if ":" not in name and not timm.is_model(name):
        raise _no_model(f"timm:{name}", name, timm.list_models())
    options = {} if classes is None else {"num_classes": classes}
    with _fetching(f"timm:{name}"):
        return timm.create_model(name, pretrained=pretrained, **options)


def _torchvision(name: str, classes: int | None, pretrained: bool) -> nn.Module:
    models = require("torchvision.models", extra="vision")
    if name not in (names := models.list_models()):
        raise _no_model(f"torchvision:{name}", name, names)
    weights = models.get_model_weights(name).DEFAULT
    preset = weights.transforms()
    with _fetching(f"torchvision:{name}"):
        if pretrained:
            module = models.get_model(name, weights=weights)
            if classes is not None and classes != num_classes(module):
                replace_head(module, classes)
        else:
            module = models.get_model(name, weights=None, **({} if classes is None else {"num_classes": classes}))
    if hasattr(preset, "mean"):  # the form in which timm's models say it
        size = preset.crop_size[-1]
        module.pretrained_cfg = {"mean": preset.mean, "std": preset.std, "input_size": (3, size, size)}
    return module


def replace_head(module: nn.Module, classes: int) -> None:
    """Put a new last linear or convolution layer, with random weights, in place.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 10))
        >>> replace_head(net, 3); net[1].out_features
        3
    """
    heads = [(n, m) for n, m in module.named_modules() if n and isinstance(m, nn.Linear | nn.Conv2d)]
    if not heads:
        raise UsageError("there is no classifier to replace", where=type(module).__name__, expected="a linear layer")
    path, old = heads[-1]
    if isinstance(old, nn.Linear):
        new: nn.Module = nn.Linear(old.in_features, classes, old.bias is not None)
    else:
        new = nn.Conv2d(old.in_channels, classes, old.kernel_size, old.stride, old.padding, bias=old.bias is not None)  # type: ignore[arg-type]
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, new)


def _transformers(name: str, classes: int | None, pretrained: bool) -> nn.Module:
    library = require("transformers", extra="language")
    options: dict[str, Any] = {} if classes is None else {"num_labels": classes}
    with _fetching(f"hf:{name}"):
        config = library.AutoConfig.from_pretrained(name, trust_remote_code=False, **options)
        kind = _architecture(library, config, classes)
        if pretrained:
            module = kind.from_pretrained(name, config=config, ignore_mismatched_sizes=classes is not None)
        else:
            module = kind.from_config(config) if hasattr(kind, "from_config") else kind(config)
        if hasattr(config, "image_size"):
            module.pretrained_cfg = _image_statistics(library, name)
    return module


def _architecture(library: Any, config: Any, classes: int | None) -> Any:
    """The class that a configuration names; a classifier where classes are asked for and it names none."""
    named = (getattr(config, "architectures", None) or [""])[0]
    if classes is None or "Classification" in named:
        return getattr(library, named, library.AutoModel)
    image = hasattr(config, "image_size")
    return library.AutoModelForImageClassification if image else library.AutoModelForSequenceClassification


def _image_statistics(library: Any, name: str) -> dict[str, Any]:
    try:
        config, _ = library.ImageProcessingMixin.get_image_processor_dict(name)
    except OSError:
        return {}
    return (
        {"mean": config.get("image_mean"), "std": config.get("image_std")} if config.get("do_normalize", True) else {}
    )


def _encoder(name: str, pretrained: bool) -> nn.Module:
    from limbeck.models.sentence import load_encoder

    if not pretrained:
        fix = f"take hf:{name} for random ones"
        raise UsageError("sentence encoders come with their weights", where=f"st:{name}", fix=fix)
    return load_encoder(name)


def _own(spec: str, given: Mapping[str, Any]) -> nn.Module:
    made = import_object(spec)
    if not isinstance(made, nn.Module):
        if not callable(made):
            raise UsageError(
                "this is no function", where=spec, found=type(made).__name__, expected="a function or module"
            )
        try:
            known = inspect.signature(made).parameters
            made = made(**{k: v for k, v in given.items() if k in known and v is not None})
        except LimbeckError:
            raise
        except Exception as error:  # the user's code may raise anything
            found = f"{type(error).__name__}: {error}"
            raise UsageError("making this model fails", where=spec, found=found, fix="correct the function") from error
    if not isinstance(made, nn.Module):
        raise UsageError("this is no model", where=spec, found=type(made).__name__, expected="torch.nn.Module")
    return made


def _fill(module: nn.Module, path: Path) -> nn.Module:
    if path.suffix == ".safetensors":
        safetensors.load(module, path)
        return module
    state = read_state(path)
    try:
        module.load_state_dict(state)
    except Exception as error:  # modules load as they like
        found = " ".join(str(error).split())[:300]
        expected = f"a state dictionary of {type(module).__name__}"
        raise UsageError("these weights cannot be loaded", where=path, found=found, expected=expected) from None
    return module


@contextmanager
def _fetching(what: str) -> Iterator[None]:
    """Turns the errors of a download, or of a cache without network, into one that says what to do."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise UsageError(
            "this model or its weights cannot be loaded",
            where=what,
            found=f"{type(error).__name__}: {reason}",
            expected="a network connection, or the files in the library's cache or in a folder",
            fix="check the name and the network, give a folder (hf:FOLDER) or a file (NAME@FILE), or ask for random weights "
            "with pretrained=False; HF_HUB_OFFLINE=1 skips the waiting",
        ) from error


def _no_model(spec: str, name: str, names: list[str]) -> UsageError:
    near = get_close_matches(name, names, n=5, cutoff=0.5)
    library = spec.partition(":")[0]
    expected = " or ".join(near) if near else f"one of the {len(names)} names of {library}"
    return UsageError(f"{library} has no such model", where=spec, found=name, expected=expected)


def _unknown(spec: str) -> UsageError:
    path = Path(spec).expanduser()
    if path.is_file():
        return UsageError(
            "a file of weights does not say which model it is of", where=path, fix=f"timm:NAME@{path}, say"
        )
    kind = spec.partition(":")[0]
    near = get_close_matches(kind, [*SCHEMES, "static", "copy"], n=2, cutoff=0.6)
    expected = " or ".join(n if n in ("static", "copy") else f"{n}:..." for n in near) if near else _FORMS
    return UsageError("there is no such model", where="model", found=spec, expected=expected)
