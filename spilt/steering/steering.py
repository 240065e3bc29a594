"""Steering: the one value that is fitted, stored, attached, measured and exported."""

from __future__ import annotations

import json
import logging
import math
import re
from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spilt import __version__
from spilt.artifacts import manifest
from spilt.artifacts.atomic import atomic_write
from spilt.errors import UserError, first_line, unknown
from spilt.settings.fields import WRITE_POINTS, refuse_not_passed
from spilt.settings.values import SCOPES
from spilt.steering import anatomy, foreign, layer_file
from spilt.steering.hooks import Applied
from spilt.steering.interventions import INTERVENTIONS, Intervention, Multiplier
from spilt.steering.nonlinear import NONLINEAR

SUFFIX = ".safetensors"
FORMAT = 1  # of the stored file
SCOPE = "scope"  # of `about`: which tokens it was fitted to act on
RECOMMENDED = "recommended_multiplier"  # of `about`: a strength, so it scales the other way round

KINDS: Mapping[str, type[Intervention]] = ChainMap(INTERVENTIONS, NONLINEAR)  # by form

log = logging.getLogger("spilt")
LAYER_FILE = re.compile(r"layer_(\d{1,9})\.pt")


class Site(NamedTuple):
    """Where an intervention acts. read_point: anatomy.COMPONENTS, None when it reads nothing; write_point: WRITE_POINTS.

    Both may be the path of a linear map inside the block instead, such as self_attn.q_proj: its input, its output.
    """

    layer: int
    read_point: str | None = None
    write_point: str = "block"


class Steering:
    """An ordered tuple of (Site, intervention): h <- h + delta(h, x, m) at each site, all at one multiplier m.

    A value: `+` and `*` give new ones and share no tensor with their terms. It describes itself: `save` and `load` need no
    second file, no layer number and no form. `about` holds what is known of it: method, model, recommended multiplier.
    """

    def __init__(self, entries: Iterable[tuple[Site, Intervention]], about: Mapping[str, Any] | None = None) -> None:
        self.entries = tuple(entries)
        self.about = dict(about or {})
        if not self.entries:
            raise UserError("a Steering has at least one (Site, intervention)")
        for site, intervention in self.entries:
            if (site.read_point, site.write_point) != (intervention.read_point, intervention.write_point):
                raise UserError(f"{site}: the intervention reads at {intervention.read_point!r} and writes at {intervention.write_point!r}")
            refuse_not_passed(site.read_point, site.write_point)

    @classmethod
    def of(cls, interventions: Mapping[int, Intervention], about: Mapping[str, Any] | None = None) -> Steering:
        """layer -> intervention, in the order of the layers."""
        return cls(((Site(n, made.read_point, made.write_point), made) for n, made in sorted(interventions.items())), about)

    @classmethod
    def nothing(cls, model: nn.Module) -> Steering:
        """h + m 0 at block 0: the model as it is, for engines that want a Steering."""
        vector: Any = INTERVENTIONS["vector"]
        with torch.random.fork_rng(devices=[]):
            return cls.of({0: vector(anatomy.hidden_size(model))}).to(model)

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted({site.layer for site, _ in self.entries}))

    @property
    def forms(self) -> tuple[str, ...]:
        """The form of each entry, by its name in KINDS."""
        return tuple(intervention.form for _, intervention in self.entries)

    @property
    def places(self) -> list[tuple[int, str]]:
        """(layer, write point) of each entry."""
        return [(site.layer, site.write_point) for site, _ in self.entries]

    @property
    def scope(self) -> str:
        """Which tokens it was fitted to act on, where `about` says it: a word of SCOPES. engine.scopes obeys it."""
        word = self.about.get(SCOPE, "all")
        if word not in SCOPES:
            raise unknown(SCOPE, str(word)[:60], SCOPES)
        return str(word)

    def parameters(self) -> Iterator[nn.Parameter]:
        for _, intervention in self.entries:
            yield from intervention.parameters()

    def at(self, multiplier: Multiplier, positions: Tensor | None = None) -> list[Applied]:
        """What `hooks.attach` takes: every entry at this multiplier (or one per row). positions [B, T] bool: where it acts; None: all.

        Raises UserError for all where it was fitted to act on some alone.
        """
        if positions is None and self.scope != "all":
            raise UserError(
                f"this Steering was fitted to act on the tokens of scope {self.scope!r} alone, and here every token would be steered; "
                f"spilt.engine.scopes obeys it; where every token is meant: steering.about.pop({SCOPE!r})"
            )
        return [Applied(site.layer, made, multiplier, positions) for site, made in self.entries]

    def on(self, layer: int) -> Steering:
        """The part of it at one layer; a recommended multiplier is that of the whole."""
        part = [(site, made) for site, made in self.entries if site.layer == layer]
        whole = len(part) == len(self.entries)
        return Steering(part, {key: value for key, value in self.about.items() if whole or key != RECOMMENDED})

    @property
    def identity(self) -> bool:
        """Whether m = 0 is the unsteered model, as of all but some nonlinear forms. Losses at 0 are the unsteered model's in any case."""
        return all(made.identity for _, made in self.entries)

    def norm(self) -> float:
        """Of the update at the lowest layer, the first there."""
        return min(self.entries, key=lambda entry: entry[0].layer)[1].norm()

    def to(self, model: nn.Module) -> Steering:
        """A copy whose parameters lie where the model's blocks compute. Raises UserError where it does not fit the model."""
        self.check(model)
        return Steering(((site, _copy(made).to(anatomy.device_of(model, site.layer))) for site, made in self.entries), self.about)

    def check(self, model: nn.Module) -> None:
        """Every site exists and has the widths of the parameters, or a UserError that names both. Another base model is a warning."""
        known, here = self.about.get("base_model") or {}, base_model(model)
        if other := {key: value for key, value in here.items() if known.get(key, value) != value}:
            was = {key: known[key] for key in other}
            log.warning("this Steering was fitted on another base model: %s; this one has %s", was, other)
        for site, intervention in self.entries:
            hidden = anatomy.write_width(model, site.layer, site.write_point)
            read = anatomy.read_width(model, site.layer, site.read_point) if site.read_point else hidden
            for name, shape in intervention.shapes(hidden, read, intervention.describe()["rank"]).items():
                found = tuple(intervention.get_parameter(name).shape)
                if found != shape:
                    raise UserError(f"{name} of {site} has shape {list(found)}; this model wants {list(shape)}")

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[tuple[Site, Intervention]]:
        return iter(self.entries)

    def __repr__(self) -> str:
        sites = ", ".join(f"{form}@{site.layer}" for (site, _), form in zip(self.entries, self.forms, strict=True))
        known = f", {self.about['method']}" if "method" in self.about else ""
        return f"Steering({sites}{known})"

    def __add__(self, other: Steering) -> Steering:
        """Both act, this one first. At one site deltas add up; an ablation and nonlinear forms read what those before them wrote there.

        Raises UserError where one acts on other tokens than the other.
        """
        if not isinstance(other, Steering):
            return NotImplemented
        if self.scope != other.scope:
            raise UserError(
                f"the scopes of these Steerings are {self.scope!r} and {other.scope!r}, and their sum has one, at whose tokens all of it "
                f"acts; where that is meant, give both the same: steering.about[{SCOPE!r}]"
            )
        about = {key: value for key, value in self.about.items() if key != RECOMMENDED and other.about.get(key) == value}
        return Steering(((site, _copy(made)) for site, made in (*self.entries, *other.entries)), about)

    def __radd__(self, other: object) -> Steering:
        """0 + s = s, which is how `sum` begins. Of any other number: TypeError."""
        if not isinstance(other, int | float) or other != 0:
            return NotImplemented
        return Steering(((site, _copy(made)) for site, made in self.entries), self.about)

    def __sub__(self, other: Steering) -> Steering:
        """This one acts, and the other one the other way round."""
        return self + -other if isinstance(other, Steering) else NotImplemented

    def __mul__(self, factor: float) -> Steering:
        """delta at m of the result is delta at factor m of this one: exact, every form holds its strength as a factor."""
        if getattr(factor, "ndim", 1) == 0:  # a number of numpy or torch
            factor = factor.item()  # type: ignore[attr-defined]
        if not isinstance(factor, int | float):
            return NotImplemented
        if not math.isfinite(factor):
            raise UserError(f"a Steering times {factor} is not one; wanted a finite number")
        about = {key: value for key, value in self.about.items() if key != RECOMMENDED}
        if factor and RECOMMENDED in self.about:
            about[RECOMMENDED] = self.about[RECOMMENDED] / factor
        return Steering(((site, _copy(made).scaled(float(factor))) for site, made in self.entries), about)

    __rmul__ = __mul__
    __array_ufunc__ = None  # numpy leaves number * Steering to __rmul__, and makes no array of entries

    def __neg__(self) -> Steering:
        return self * -1.0

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Steering):
            return NotImplemented
        if [(site, made.form, made.options()) for site, made in self] != [(site, made.form, made.options()) for site, made in other]:
            return False
        states = ((mine.state_dict(), theirs.state_dict()) for (_, mine), (_, theirs) in zip(self, other, strict=True))
        return all(all(torch.equal(a[name].cpu(), b[name].cpu()) for name in a) for a, b in states)

    __hash__ = None  # type: ignore[assignment]

    # ---- files

    def save(self, path: str | Path) -> Path:
        """One safetensors file that says everything: parameters as `{entry}.{name}`, sites and `about` as metadata. Returns its path."""
        path = Path(path)
        if path.suffix != SUFFIX:
            raise UserError(f"{path}: a Steering is stored as a {SUFFIX} file; give such a name")
        atomic_write(path, self.content())
        return path

    def content(self) -> bytes:
        """What `save` writes: the same Steering gives the same bytes."""
        from safetensors.torch import save

        tensors = {
            f"{number}.{name}": value.detach().float().cpu().contiguous()
            for number, (_, made) in enumerate(self.entries)
            for name, value in made.state_dict().items()
        }
        entries = [
            {"form": made.form, **site._asdict(), "alpha": made.describe()["alpha"], **made.options()} for site, made in self.entries
        ]
        words = {"format": FORMAT, "entries": entries, "about": self.about, "spilt": __version__}
        return save(tensors, metadata={"steering": json.dumps(words, sort_keys=True)})

    @classmethod
    def load(cls, path: str | Path, layer: int | None = None) -> Steering:
        """A stored Steering, a released layer_{id}.pt (its name says the layer), a folder of them, or what another program wrote.

        layer: the block of a vector that does not say it, or the one to take of several. foreign.py says what is read of others.
        Raises UserError for anything else, with what was found.
        """
        path = Path(path)
        whole = cls._load(path, layer)
        if layer is not None and layer not in whole.layers:
            raise UserError(f"{path}: has the layers {', '.join(map(str, whole.layers))}, not {layer}")
        return whole if layer is None else whole.on(layer)

    @classmethod
    def _load(cls, path: Path, layer: int | None) -> Steering:
        files = {int(hit[1]): file for file in sorted(path.iterdir()) if (hit := LAYER_FILE.fullmatch(file.name))} if path.is_dir() else {}
        if files:
            parts = [cls.load(files[layer]) for layer in sorted(files)]
            about = {key: value for key, value in parts[0].about.items() if all(part.about.get(key) == value for part in parts)}
            return cls((entry for part in parts for entry in part.entries), about)
        if hit := LAYER_FILE.fullmatch(path.name):
            read = partial(_released, layer=int(hit[1]))
        elif path.suffix == SUFFIX and _says_steering(path):
            read = partial(_stored)
        else:
            read = partial(_foreign, layer=layer)
        with torch.random.fork_rng(devices=[]):  # an intervention draws its first values, whatever is put in their place
            return read(path)


def base_model(model: nn.Module) -> dict[str, Any]:
    """Which model a Steering fits: its kind, width and depth."""
    config: Any = model.config
    return {"model_type": config.model_type, "hidden_size": anatomy.hidden_size(model), "layers": len(anatomy.blocks(model))}


def _copy(intervention: Intervention) -> Intervention:
    import copy

    return copy.deepcopy(intervention)


def _says_steering(path: Path) -> bool:
    """Whether a safetensors file is ours, or cannot be read at all, which _stored tells."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return "steering" in (file.metadata() or {})
    except (SafetensorError, OSError):
        return True


def _foreign(path: Path, layer: int | None) -> Steering:
    found = [(Site(n, made.read_point, made.write_point), made.eval().requires_grad_(False)) for n, made in foreign.read(path, layer)]
    return Steering(found, {"source": path.name})


def _stored(path: Path) -> Steering:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            words = json.loads((file.metadata() or {}).get("steering", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as safetensors: {first_line(error)}") from None
    if not isinstance(words, dict) or words.get("format") != FORMAT or not isinstance(words.get("entries"), list):
        found = ", ".join(tensors) or "none"
        raise UserError(f"{path}: no Steering of format {FORMAT} (its metadata does not say so); tensors found: {found}")
    try:
        entries = [_entry(path, number, row, tensors) for number, row in enumerate(words["entries"])]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: its metadata is not that of a Steering ({type(error).__name__}: {error})") from None
    return Steering(entries, words.get("about") or {})


def _entry(path: Path, number: int, row: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[Site, Intervention]:
    if row["form"] not in KINDS:
        raise UserError(f"{path}: entry {number} has the form {row['form']!r}; have: {', '.join((*INTERVENTIONS, *NONLINEAR))}")
    site = Site(int(row["layer"]), row["read_point"], row["write_point"])
    places = (site.read_point, *anatomy.COMPONENTS), (site.write_point, *WRITE_POINTS)
    known = all(name in (None, *names) or layer_file.LINEAR.fullmatch(str(name)) for name, *names in places)
    if site.layer < 0 or site.write_point is None or not known:
        raise UserError(f"{path}: entry {number} has no usable site: {site}")
    kind = KINDS[row["form"]]
    own = {name.partition(".")[2]: value for name, value in tensors.items() if name.partition(".")[0] == str(number)}
    wanted = kind.shapes(1, 1, 1)
    if {name: value.ndim for name, value in own.items()} != {name: len(shape) for name, shape in wanted.items()}:
        found = ", ".join(f"{name} {list(value.shape)}" for name, value in own.items()) or "none"
        raise UserError(f"{path}: entry {number}, a {kind.form}, wants the tensors {', '.join(wanted)}; found: {found}")
    for name, value in own.items():
        if not value.is_floating_point() or not torch.isfinite(value).all():
            raise UserError(f"{path}: tensor {number}.{name} holds values that are not finite numbers")
    options = {name: row[name] for name in kind.named}
    made: Any = kind.of_parameters(own, read_point=site.read_point, write_point=site.write_point, **options)
    if row.get("alpha") is not None:
        made.alpha = float(row["alpha"])
    return site, made.eval().requires_grad_(False)


def _released(path: Path, layer: int) -> Steering:
    """layer_{id}.pt of one concept; what its manifest knows, where there is one, comes along."""
    held = layer_file.read(path)
    form = layer_file.form_of(held)
    parts = (manifest.read(path) or {}).get("parts")
    known = parts.get("settings") if isinstance(parts, dict) else None
    settings: dict[str, Any] = known if isinstance(known, dict) else {}
    if layer_file.has_linears(held):
        several = layer_file.linears(held, path, form)
    else:
        state = layer_file.one_concept(held, path, form, None)
        own = state.get("site") if isinstance(state, dict) else None
        read_point, write_point = None, str(own or settings.get("site", "block"))
        if INTERVENTIONS[form].reads:
            read_point = str(state.get("intervention_components") or settings.get("intervention_components", "mlp_mid"))
        several = [INTERVENTIONS[form].from_state(state, read_point=read_point, write_point=write_point)]
    if not all(torch.isfinite(value).all() for made in several for value in made.parameters()):
        raise UserError(f"{path}: holds NaN or infinite values; fit it again")
    about: dict[str, Any] = {"method": settings["method"]} if "method" in settings else {}
    if about and isinstance(parts, dict) and isinstance(parts.get("model"), str):
        about |= {"settings": settings, "base_model": {"checkpoint": parts["model"]}}
    if settings.get("steer_positions") in SCOPES[1:]:
        about |= {SCOPE: settings["steer_positions"]}
    return Steering(((Site(layer, made.read_point, made.write_point), made.eval().requires_grad_(False)) for made in several), about)


def per_row(multiplier: Multiplier) -> Multiplier:
    """A strength as the interventions take it: a number, or one for each row of the batch [B] as [B, 1, 1]."""
    return multiplier.reshape(-1, 1, 1) if isinstance(multiplier, Tensor) and multiplier.ndim else multiplier
