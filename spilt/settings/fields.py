"""The settings of the three verbs: what each key means, its unit and its released default.

One field = one key of the YAML files, declared once. A verb uses a key if its class has the field:
`FitSettings` for fit (`--mode generate`), `GenerateSettings` for generate (`--mode apply`), `MeasureSettings` for measure
(`--mode loss`). Values are checked whenever an object is made, from files or in code.

Sources: the released YAML files and code (EasyEdit run_SPILT); "ours" marks a key that they do not have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from typing import Any

from spilt.cell import FORMS, NONLINEARITIES
from spilt.errors import UserError
from spilt.settings.values import Bad, Reader, choice, flag, many, number, optional, plain, positions, steered, text, whole, whole_or_all

POINTS = ("mlp_mid", "mlp", "attn", "block")  # read points of lora and local_weight
ANATOMY = ("blocks", "attn", "mlp", "mlp_mid")  # what of a model has a place that can be told
# the block's output, after both residual adds; the output of its down projection, of its MLP, of its attention; the input of its MLP
WRITE_POINTS = ("block", "down_proj", "mlp", "attn", "mlp_input")
# write point -> the read points that a forward has passed by then; the others: all
PASSED = {"attn": ("attn", "block"), "mlp_input": ("attn", "block")}
ADAPTERS = ("lora", "dora", "pissa", "delora", "oft", "boft", "ia3")  # kinds of PEFT, of weight arithmetic
CONTRASTS = ("difference", "bisector", "matching", "not_matching")  # what it makes of two adapters
PAIRS = ("orig_add", "orig_sub")
SUBSTRACTIONS = ("normal", "null_it_out")
LOSSES = ("scaled_simpo", "simpo", "dpo", "ipo", "apo_zero")
STRONGEST = 1e6  # a strength, either way: beyond it float32 keeps nothing of the stream
DTYPES = ("bfloat16", "float16", "float32")
DTYPE_ALIASES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}
DTYPE_ALIASES |= {f"torch.{name}": name for name in DTYPES}
# other spellings on the command line and in YAML; all names in any case
METHOD_ALIASES = {"split": "spilt"}  # the paper's spelling
WEIGHT_ARITHMETIC = "weight_arithmetic"
OF_ADAPTERS = ("adapter", "modules", "block_size", "warmup", "contrast")  # keys of it alone
OF_POST_BLOCK = {"alpha": 1.0, "nonlinearity": "silu"}  # keys of that form alone, and their defaults
# keys that came after results had been stored
LATER = ("joint", "steer_positions", "anatomy", "direction_layer", *OF_ADAPTERS, *OF_POST_BLOCK)
INTERVENTION_ALIASES = {"weight": "local_weight"}  # released file names and YAML


# of methods that were not released, what their papers have in place of the released defaults
OWN_DEFAULTS: dict[str, dict[str, Any]] = {
    WEIGHT_ARITHMETIC: {
        "lr": 2e-4, "n_epochs": 1, "gradient_accumulation_steps": 4, "weight_decay": 0.01, "rank": 32, "lora_alpha": 64.0, "dropout": 0.0,
        "block_size": 8, "warmup": 5, "contrast": "difference",
    },
    "bipo": {"lr": 5e-4, "n_epochs": 20, "beta": 0.1, "steering_factors": (1.0,)},
}  # fmt: skip


def setting(read: Reader, default: Any = MISSING, *, by: Callable[[str, str], Any] | None = None) -> Any:
    """A field read with `read`. `by(method, intervention_method)` gives a released default that depends on the two."""
    return field(default=None if by else default, metadata={"read": read, "by": by})


def method_name(value: Any) -> str:
    word = text(value).lower()
    return METHOD_ALIASES.get(word, word)


def intervention_name(value: Any) -> str:
    word = text(value).lower()
    return INTERVENTION_ALIASES.get(word, word)


def read_field(key: Field[Any], value: Any, where: str = "") -> Any:
    """`value` as the field holds it; a wrong one raises UserError `where: key = value is ...`."""
    try:
        return key.metadata["read"](value)
    except Bad as error:
        shown = f'"{value}"' if isinstance(value, str) else str(value)
        shown = shown if len(shown) <= 80 else f"{shown[:80]} ..."
        raise UserError(f"{where}{': ' if where else ''}{key.name} = {shown} {error}") from None


class Checked:
    """Base of the settings: every field goes through its reader, so an object that exists is valid."""

    def __post_init__(self) -> None:
        for key in fields(self):  # type: ignore[arg-type]  # every subclass is a dataclass
            value, by = plain(getattr(self, key.name)), key.metadata["by"]
            if by and value is None:
                value = by(getattr(self, "method", ""), getattr(self, "intervention_method", ""))
            object.__setattr__(self, key.name, read_field(key, value))

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON-able values, for the manifest beside an artifact. Keys of LATER stand there where they are set."""
        found = asdict(self)  # type: ignore[call-overload]
        unset = {key.name: key.default for key in fields(self) if key.name in LATER}  # type: ignore[arg-type]
        kept = {name: value for name, value in found.items() if name not in unset or value != unset[name]}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in kept.items()}


@dataclass(frozen=True)
class GenerationParams(Checked):
    """How tokens are drawn. None = what the checkpoint's own generation_config.json says (released behaviour)."""

    max_new_tokens: int = setting(whole(1), 128)  # tokens per response; released 128
    do_sample: bool = setting(flag, True)  # false = greedy
    temperature: float = setting(number(0, 1000), 1.0)  # divides the logits; released 1.0
    top_k: int | None = setting(optional(whole(0)), None)  # keep the k likeliest tokens; 0 = all
    top_p: float | None = setting(optional(number(high=1, above=0)), None)  # keep the likeliest tokens of this total probability
    min_p: float | None = setting(optional(number(0, 1)), None)  # drop tokens below this share of the likeliest one's probability
    repetition_penalty: float | None = setting(optional(number(above=0)), None)  # divides the logits of tokens seen before; 1 = none
    no_repeat_ngram_size: int | None = setting(optional(whole(0)), None)  # tokens; 0 = repeats allowed
    num_beams: int = setting(whole(1), 1)  # only 1, see below

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_beams > 1:
            raise UserError(
                f"generation_params.num_beams = {self.num_beams} is not supported: each row of a batch has its own multiplier, "
                "and a beam moves between rows; leave it out, or set 1"
            )
        if self.do_sample and self.temperature == 0:
            raise UserError("generation_params.temperature = 0 cannot be sampled from; set do_sample: false for greedy decoding")

    def as_kwargs(self) -> dict[str, Any]:
        """Arguments of transformers' `generate`: what is set, and no sampling option when decoding is greedy."""
        given = {name: value for name, value in self.as_dict().items() if value is not None}
        if not self.do_sample:
            for name in ("temperature", "top_k", "top_p", "min_p"):
                given.pop(name, None)
        return given


def generation_params(value: Any) -> GenerationParams:
    """GenerationParams as it is; a mapping of them is made into one by the resolver, which knows the file."""
    if not isinstance(value, GenerationParams):
        raise Bad("is not a mapping of generation parameters")
    return value


@dataclass(frozen=True)
class Common(Checked):
    """What all three verbs use."""

    method: str = setting(method_name)  # how the parameters are found; YAML `alg_name`; decided by the path
    intervention_method: str = setting(intervention_name)  # form: vector, lora, local_weight; decided by the path
    layers: tuple[int, ...] = setting(many(whole(0), distinct=True))  # 0-based decoder blocks; released 20 gemma-2-9b-it, 14 qwen2.5-7b-it
    # Read point of lora and local_weight: input of the MLP down projection, of the MLP, of attention, of the block.
    intervention_components: str = setting(choice("read point", POINTS), "mlp_mid")
    # Write point: the block's output, or (ours) the output of its down projection, where Gemma-2's norm still follows, of its MLP or
    # attention, or the input of its MLP.
    site: str = setting(choice("write point", WRITE_POINTS), "block")
    concept_id: int | None = setting(optional(whole(0)), None)  # row of a file with several concepts; None = the only or first one
    seed: int = setting(whole(0), 42)  # of initialisation, order, factors, dropout, sampling; released 42
    dtype: str = setting(choice("dtype", DTYPES, DTYPE_ALIASES), "bfloat16")  # of the model (YAML `torch_dtype`); parameters are float32
    use_chat_template: bool = setting(flag, True)  # wrap prompts in the tokenizer's chat template
    system_prompt: str = setting(text, "")  # "" = no system turn
    # Ours: which tokens are steered. None = the released way: all of them while text is made; in fits and released losses of a
    # vector what `intervention_positions` says, which leaves the template prefix alone. Curves are measured as text is made.
    steer_positions: str | None = setting(optional(steered), None)
    anatomy: str = setting(text, "")  # ours: where the model's parts are, as in `blocks=model.layers,mlp=mlp`; "" = found by structure

    def __post_init__(self) -> None:
        super().__post_init__()
        row = FORMS.get(self.intervention_method)
        if row and row.reads:
            refuse_not_passed(self.intervention_components, self.site)

    @property
    def applied_positions(self) -> str:
        """Where it acts while text is made, in the words of `steer_positions`."""
        return self.steer_positions or "all"


def refuse_not_passed(read_point: str | None, write_point: str) -> None:
    """Raises UserError where what is read is computed after what is written."""
    if read_point in POINTS and read_point not in (may := PASSED.get(write_point, POINTS)):
        raise UserError(
            f"what is read at {read_point!r} comes after what is written at {write_point!r} in a block; intervention_components: "
            f"{' or '.join(may)}, or another site"
        )


def _by_method(name: str, released: Any = None) -> Callable[[str, str], Any]:
    """The default of a setting: the method's own, else the released one, that of the form where none is given."""

    def default(method: str, form: str) -> Any:
        of_form = released if released is not None else getattr(FORMS.get(form, FORMS["lora"]), name.removeprefix("steering_"), None)
        return OWN_DEFAULTS.get(method, {}).get(name, of_form)  # a name that does not exist is told by others

    return default


def _of_post_block(name: str) -> Callable[[str, str], Any]:
    return lambda _, form: OF_POST_BLOCK[name] if form == "post_block" else None


def _adapter(method: str, form: str) -> str | None:
    return None if method != WEIGHT_ARITHMETIC else "lora" if form == "lora" else "dora"


def _released_substraction(method: str, intervention: str) -> str:
    return "null_it_out" if (method, intervention) == ("reps", "vector") else "normal"


@dataclass(frozen=True)
class ScoringSettings(Common):
    """What fit and measure share: the two answers of a question, as token sequences."""

    batch_size: int = setting(whole(1), 4)  # sequence pairs per minibatch
    preference_pairs: tuple[str, ...] = setting(many(choice("preference pair", PAIRS), distinct=True), PAIRS)  # methods.md section 4
    # orig_sub at factor -s, or (vector only) with the vector's component removed; reps vector uses the latter.
    substraction_type: str = setting(choice("substraction_type", SUBSTRACTIONS), by=_released_substraction)
    output_length: int = setting(whole(1), 512)  # tokens per sequence, prompt included; longer ones are cut
    intervention_positions: str = setting(positions, "all")  # where a vector acts; lora and local_weight act everywhere
    max_num_of_examples: int | None = setting(whole_or_all(), None)  # rows of the data set; None = all

    @property
    def fitted_positions(self) -> str:
        """Where it acts in fits and released losses, in the words of `steer_positions`."""
        released = "skip_prefix" if self.intervention_positions == "all" else self.intervention_positions
        return self.steer_positions or (released if FORMS[self.intervention_method].positional else "all")


@dataclass(frozen=True)
class FitSettings(ScoringSettings):
    """How a method finds the parameters of an intervention (`--mode generate`)."""

    # the intervention
    rank: int = setting(whole(1), by=_by_method("rank"))  # of lora; released 4 (YAML `rank` or `low_rank_dimension`); of post_block 8
    lora_alpha: float = setting(number(), by=_by_method("lora_alpha", 32.0))  # stored with a lora, scales nothing: the effect is m (x A) B
    # probability; on v itself (vector), on the delta (lora, local_weight)
    dropout: float = setting(number(0, below=1), by=_by_method("dropout"))
    # ours: delta = m alpha U act(D h) of post_block; None for every other form
    alpha: float | None = setting(optional(number()), by=_of_post_block("alpha"))
    nonlinearity: str | None = setting(optional(choice("nonlinearity", NONLINEARITIES)), by=_of_post_block("nonlinearity"))
    joint: bool = setting(flag, False)  # ours: the layers are fitted together, by one loss; else each alone (released)
    # the loop
    # minibatch groups per optimiser step
    gradient_accumulation_steps: int = setting(whole(1), by=_by_method("gradient_accumulation_steps", 1))
    n_epochs: int = setting(whole(1), by=_by_method("n_epochs", 2))  # passes over the pairs
    lr: float = setting(number(above=0), by=_by_method("lr"))  # AdamW, linear decay to 0
    weight_decay: float = setting(number(0), by=_by_method("weight_decay", 0.0))  # of AdamW
    max_grad_norm: float = setting(number(above=0), 1.0)  # gradient norm is clipped to this; fixed in the released code
    # training strengths: s is drawn from these; shared by winning and losing sequence, or (released) drawn for each
    steering_factors: tuple[float, ...] = setting(many(number()), by=_by_method("steering_factors"))
    shared_factor: bool = setting(flag, False)  # ours
    # sft and spilt: pos L_p + neg L_n + margin_penalty relu(threshold - (L_n - L_p)), losses in nats per answer token
    pos_loss_weight: float = setting(number(0), 1.0)
    neg_loss_weight: float = setting(number(0), by=lambda method, _: 0.5 if method == "spilt" else 0.0)
    margin_penalty_weight: float = setting(number(0), by=lambda method, _: 5.0 if method == "spilt" else 0.0)
    margin_threshold: float = setting(number(), 0.5)  # nats per token
    ref_loss_weight: float = setting(number(0), 0.0)  # of relu(L_p - L_p_ref) + relu(L_n - L_n_ref); 0 = no reference pass
    hinge: str = setting(choice("hinge", ("batch", "pair")), "batch")  # on minibatch means (released) or per pair (the paper; ours)
    # reps; bipo has beta
    loss_type: str = setting(choice("loss_type", LOSSES), "scaled_simpo")
    beta: float = setting(number(above=0), by=_by_method("beta", 1.0))  # scale of the log-odds
    gemma: float = setting(number(), 0.0)  # target margin of simpo, divided by beta; the released spelling of gamma
    simpo_scaler: float = setting(number(), 1.0)  # R = simpo_scaler (log p_ref(l) - log p_ref(w))
    label_smoothing: float = setting(number(0, below=1), 0.0)  # probability that a pair is the wrong way round
    # closed forms
    multiple_choice: bool = setting(flag, False)  # read the second-to-last token instead of the mean over answer tokens
    # ours: the block whose direction is used at every layer of the cell, as directional ablation does; None = each layer has its own
    direction_layer: int | None = setting(optional(whole(0)), None)
    # weight_arithmetic (ours; rank, lora_alpha, dropout are those of its adapters): None for every other method
    adapter: str | None = setting(optional(choice("adapter", ADAPTERS)), by=_adapter)  # the kind that both are
    modules: tuple[str, ...] | None = setting(optional(many(text, distinct=True)), None)  # names of linear maps; None = all of a block
    block_size: int | None = setting(optional(whole(1)), by=_by_method("block_size"))  # of oft and boft
    warmup: int | None = setting(optional(whole(0)), by=_by_method("warmup"))  # in which lr rises; at most half of all
    contrast: str | None = setting(optional(choice("contrast", CONTRASTS)), by=_by_method("contrast"))  # what is made of the two

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method == WEIGHT_ARITHMETIC or (row := FORMS.get(self.intervention_method)) and row.joint:  # an adapter has all its layers
            object.__setattr__(self, "joint", len(self.layers) > 1)
        if self.joint and len(self.layers) < 2:
            raise UserError(f"joint = true needs two layers or more; layers has {len(self.layers)}: add one, or leave joint out")
        given = [name for name in OF_ADAPTERS if getattr(self, name) is not None]
        if given and self.method != WEIGHT_ARITHMETIC:
            value = getattr(self, given[0])
            raise UserError(f"{given[0]} = {value} is of {WEIGHT_ARITHMETIC}; {self.method} has no adapters: leave it out")
        if self.intervention_method != "post_block":
            for name in OF_POST_BLOCK:
                if (value := getattr(self, name)) is not None:
                    raise UserError(f"{name} = {value} is of post_block; {self.intervention_method} has none: leave it out")
        if self.adapter is not None and self.intervention_method == "lora" != self.adapter:
            raise UserError(f"adapter = {self.adapter}: its change is dense: --intervention_method local_weight, or adapter: lora")
        removes = self.substraction_type == "null_it_out" and "orig_sub" in self.preference_pairs
        if removes and not FORMS[self.intervention_method].direction:
            raise UserError(
                f"substraction_type = null_it_out needs a vector to remove; {self.intervention_method} has none: "
                "set substraction_type: normal, or preference_pairs: [orig_add]"
            )


@dataclass(frozen=True)
class MeasureSettings(ScoringSettings):
    """How the losses of both answers are measured (`--mode loss`). Read point, rank and form come from the stored intervention."""

    batch_size: int = setting(whole(1), 1)  # sequence pairs per pass; released 1
    sweep_points: int = setting(whole(3), 21)  # strengths that a sweep begins with, as many below 0 as above; ours
    substraction_type: str = setting(choice("substraction_type", SUBSTRACTIONS), "normal")


@dataclass(frozen=True)
class GenerateSettings(Common):
    """How text is produced (`--mode apply`)."""

    multipliers: tuple[float, ...] = setting(many(number()), (1.0,))  # strengths m; the command line's --multipliers goes before
    batch_size: int | None = setting(optional(whole(1)), None)  # texts made side by side; None = as memory allows; changes no result; ours
    generation_data_size: int | None = setting(whole_or_all(), None)  # prompts used, from the first; None = all
    num_responses: int = setting(whole(1), 1)  # texts per prompt
    generate_orig_output: bool = setting(flag, False)  # also the unsteered answer, `orig_pred`
    generation_params: GenerationParams = setting(generation_params, GenerationParams())
