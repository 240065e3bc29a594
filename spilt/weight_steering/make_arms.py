"""Stage dw: what is compared. dW of each pair of adapters as a Steering in float32, and vectors found from the same answers."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spilt.artifacts.atomic import atomic_write
from spilt.artifacts.weights import CONFIG, SIDES, WEIGHTS
from spilt.errors import UserError, checked_name
from spilt.terminal import say
from spilt.weight_steering import data, personas, train
from spilt.weight_steering.flags import METHODS, MODES, OURS, PROMPT
from spilt.weight_steering.stage import Context, shown

if TYPE_CHECKING:
    from spilt.steering.steering import Steering

log = logging.getLogger("spilt")
STAGE = "dw"
OWN = "own"  # an arm of --pos and --neg
OF_DW = ("pos", "neg", "mode", "scale", "keep_layers", "keep_modules", "bias_only", "add", "dtype", "seed")
OF_VECTORS = ("vector_layer", "vector_epochs", "dtype", "seed", "layers")


def make(run: Context) -> None:
    run.dealt(run.team.on_main(lambda: _arms(run)), lambda arm: _one(run, *arm))


def _one(run: Context, name: str, kind: str | None) -> None:
    if kind is not None:
        _dw(run, name, kind)
    elif name == PROMPT:
        _prompt(run)
    else:
        _vector(run, name)


def _arms(run: Context) -> list[tuple[str, str | None]]:
    """(name, whose dW it is); of what stands beside dW (method, None)."""
    words = run.words
    own = words["pos"] is not None
    names = [words["name"] or OWN] if own else [words["name"] or kind for kind in words["adapter"]]
    if words["name"] and not own and len(words["adapter"]) > 1:
        raise UserError(f"--name {words['name']} is one name, and --adapter has {len(words['adapter'])}; give one adapter at a time")
    for name in names:
        if name in METHODS:
            raise UserError(f"--name {name}: is that of a method; give another")
    dWs = zip([checked_name("name", name) for name in names], [OWN] if own else words["adapter"], strict=True)
    return [*dWs, *((method, None) for method in words["methods"] or ())]


# ---------------------------------------------------------------- dW


def _dw(run: Context, name: str, kind: str) -> None:
    words, path = run.words, run.folder.arm(name)
    settings = {key: value for key, value in run.settings(STAGE).items() if key in OF_DW} | {"adapter": kind}
    if kind == OWN:
        folders = [Path(words[side]) for side in SIDES]
        for folder in folders:
            if not (folder / WEIGHTS).is_file() or not (folder / CONFIG).is_file():
                raise UserError(f"{folder}: is no PEFT adapter; wanted a folder with {CONFIG} and {WEIGHTS}")
        settings |= {"pos": None, "neg": None}
        inputs = [folder / file for folder in folders for file in (WEIGHTS, CONFIG)]
    else:
        folders = [train.folder_of(run, kind, side) for side in SIDES]
        inputs = [folder / WEIGHTS for folder in folders]
    added = list(words["add"] or ())
    parts = run.parts(STAGE, [], settings)
    parts["inputs"] = _hashes(run, inputs + added)
    if not run.wanted(path, parts):
        return
    from spilt import api
    from spilt.weights import training as weights

    pos, neg = (api.read_adapter(run.host.model, folder) for folder in folders)
    made = _made(pos, neg, words, run)
    weights.check(made, name)
    told = diagnostics(run.host.model, pos, neg, made)
    about = {"kind": "dW", "adapter": kind, "mode": words["mode"], "behavior": run.behaviour, "base_model": _base(run)}
    atomic_write(run.folder.diagnostics(name), json.dumps(told, indent=1) + "\n")
    run.store(path, _with(made, about).content(), parts, {"norm": told["norm"], "kind": "dW", "adapter": kind})
    _show(name, told)


def _hashes(run: Context, paths: Sequence[Path]) -> dict[str, str]:
    from spilt.artifacts import manifest

    lacking = [path for path in paths if not path.is_file()]
    if lacking:
        raise UserError(f"{lacking[0]}: no such file")
    return {
        run.relative(path) if run.relative(path) != path.name else f"{i}/{path.name}": manifest.file_hash(path)
        for i, path in enumerate(paths)
    }


def _base(run: Context) -> dict[str, Any]:
    from spilt.steering.steering import base_model

    return {**base_model(run.host.model), "name": run.name, "checkpoint": run.model_hash}


def _with(made: Steering, about: Mapping[str, Any]) -> Steering:
    from spilt.steering.steering import Steering as Made

    return Made(made.entries, about)


def _made(pos: Steering, neg: Steering, words: Mapping[str, Any], run: Context) -> Steering:
    """scale * part(constants(mode(tau+, tau-))) + others: each step as its flag says, or left out."""
    from spilt.steering.steering import Steering as Made
    from spilt.weights import arithmetic

    # in the order of flags.MODES
    ways: tuple[Callable[[Steering, Steering], Steering], ...] = (
        arithmetic.difference, arithmetic.bisector, lambda plus, _: plus, lambda _, minus: minus * -1.0,
    )  # fmt: skip
    made = dict(zip(MODES, ways, strict=True))[words["mode"]](pos, neg)
    if words["bias_only"]:
        made = arithmetic.constants(made)
    if words["keep_layers"] or words["keep_modules"]:
        made = arithmetic.part(made, words["keep_layers"], words["keep_modules"])
    if words["scale"] != 1:
        made = made * words["scale"]
    for path in words["add"] or ():
        made = made + arithmetic.at_maps(run.host.model, Made.load(path))
    return arithmetic.combined(made) if words["add"] else made


def diagnostics(model: Any, pos: Steering, neg: Steering, made: Steering) -> dict[str, Any]:
    """Geometry of both adapters, norm and shares of what was made, map by map, and what bfloat16 would have lost."""
    from spilt.weights import arithmetic
    from spilt.weights import diagnostics as weights

    maps = weights.by_module(made, model)
    share = maps.assign(name=maps["module"].str.rpartition(".")[2]).groupby("name")["share"].sum()
    return {
        "geometry": _plain(weights.geometry(pos, neg)),
        "norm": arithmetic.norm(made),
        "forms": sorted(set(made.forms)),
        "maps": len(maps),
        "share_of_modules": _plain(share.to_dict()),
        "share_of_layers": _plain({str(layer): value for layer, value in maps.groupby("layer")["share"].sum().items()}),
        "bfloat16_error": _plain(weights.rounding(model, pos, neg)),
        "by_map": [_plain(row) for row in maps.to_dict("records")],
    }


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON has it: what is no number is null."""
    return {name: None if isinstance(value, float) and value - value != 0 else value for name, value in row.items()}


def _show(name: str, told: Mapping[str, Any]) -> None:
    geometry, lost = told["geometry"], told["bfloat16_error"]
    shown([geometry], dict.fromkeys(geometry, ".4g"))
    largest = sorted(told["by_map"], key=lambda row: -(row["share"] or 0))[:5]
    columns = {"layer": "", "module": "", "norm": ".4g", "relative": ".2%", "share": ".1%", "top": ".1%", "effective_rank": ".1f"}
    shown(largest, columns)
    shares = ", ".join(f"{module} {value:.0%}" for module, value in told["share_of_modules"].items())
    say(f"{name}: norm {told['norm']:.4g} over {told['maps']} maps; shares {shares}")
    losses = ", ".join(f"{value:.2%} {how}" for how, value in lost.items() if value is not None)
    say(f"{name}: of this bfloat16 would lose {losses}; it is float32")


# ---------------------------------------------------------------- beside it


def _prompt(run: Context) -> None:
    """The personas themselves, as system prompts: + is POS, - is NEG."""
    run.use(run.folder.personas)
    parts = run.parts(STAGE, [run.folder.personas], {"dtype": run.words["dtype"]})
    if run.wanted(run.folder.prompt(), parts):
        run.store(run.folder.prompt(), json.dumps({"pairs": run.pairs}, indent=1, ensure_ascii=False) + "\n", parts, {"kind": PROMPT})


def _vector(run: Context, method: str) -> None:
    """A steering vector from the same answers: POS matching, NEG not matching, the question without persona."""
    path = run.folder.arm(method)
    run.use(run.folder.answers)
    settings = {key: value for key, value in (run.settings(STAGE) | {"layers": run.words["layers"]}).items() if key in OF_VECTORS}
    parts = run.parts(STAGE, [run.folder.answers], settings | {"method": method})
    if not run.wanted(path, parts):
        return
    from spilt import api
    from spilt.baselines import fit as baselines
    from spilt.data import readers
    from spilt.methods import METHODS as methods
    from spilt.steering import anatomy
    from spilt.verbs.base import adapted_layers

    layers = run.words["layers"] or adapted_layers(len(anatomy.blocks(run.host.model)))
    layer = run.words["vector_layer"] if run.words["vector_layer"] is not None else layers[len(layers) // 2]
    rows = data.read(run, personas.TRAIN)
    pairs = [(row["prompt"], row["response_pos"], row["response_neg"]) for row in rows]
    if method in OURS:
        how: dict[str, Any] = {"dtype": run.words["dtype"], "seed": run.words["seed"]}
        if methods[method].loss is not None:
            how["n_epochs"] = run.words["vector_epochs"]
        made = api.fit(run.host.model, run.host.tokenizer, pairs, layer=layer, method=method, intervention="vector", **how)
    else:
        some = [readers.Pair(*pair, None, None, number) for number, pair in enumerate(pairs)]
        made = baselines.fit(method, run.host.model, run.host.tokenizer, some, [layer])
    about = {"kind": "vector", "method": method, "layer": layer, "behavior": run.behaviour, "base_model": _base(run)}
    run.store(path, _with(made, about).content(), parts, {"kind": "vector", "layer": layer, "norm": made.norm()})
