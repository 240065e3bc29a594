"""Tiny random models made from the anatomy rows, a tiny tokenizer, and whole small base folders for the command line.

Nothing is downloaded. Weights are wide enough that greedy texts, losses and read points really differ.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import counts
import torch
from torch import Tensor, nn

from spilt import cell, plan
from spilt.methods import METHODS
from spilt.steering import anatomy
from spilt.steering.anatomy import COMPONENTS, FAMILIES
from spilt.steering.interventions import INTERVENTIONS, Intervention

FORMS = {name: form for name, form in cell.FORMS.items() if form.in_all}  # the others have test files of their own
HIDDEN, MIDDLE, LAYERS, WINDOW = 32, 48, 5, 24  # D, F of 'mlp_mid', blocks, sliding window of the families that have one
SPECIAL = ("<pad>", "<bos>", "<eos>", "<turn>", "<end>")
PAD, BOS, EOS, _TURN, END = range(len(SPECIAL))
VOCAB = 300
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ '<turn>' + message['role'] + '\\n' + message['content'] + '<end>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn>model\\n' }}{% endif %}"
)


# ---------------------------------------------------------------- models


# kinds of blocks of the families that mix them
LINEAR = ["linear_attention", "full_attention"]
KINDS: dict[str, dict[str, Any]] = {
    "qwen3_next": {"layer_types": [LINEAR[i % 2] for i in range(LAYERS)]},
    "qwen3_5_text": {"layer_types": [LINEAR[i % 2] for i in range(LAYERS)]},
    "granitemoehybrid": {"layer_types": [("mamba", "attention")[i % 2] for i in range(LAYERS)]},
}


def config(model_type: str, **changes: Any) -> Any:
    """A small configuration of a family; it is given the sizes that it knows (a stray sliding_window would shape its cache)."""
    from transformers import AutoConfig

    if model_type == "gemma3":  # with an image tower, which stays dark
        sight = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "image_size": 28}
        text = config("gemma3_text", **changes)
        return AutoConfig.for_model(model_type, text_config=text.to_dict(), vision_config=sight, mm_tokens_per_image=4)
    sizes = {
        "hidden_size": HIDDEN, "intermediate_size": MIDDLE, "n_inner": MIDDLE, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8, "vocab_size": VOCAB, "max_position_embeddings": 512,
        "sliding_window": WINDOW, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS,
        "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "shared_intermediate_size": MIDDLE, "shared_expert_intermediate_size": 16, "residual_multiplier": 0.5, "logit_scale": 1.0,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64, "mamba_d_state": 8, "mamba_chunk_size": 8, "attn_layer_indices": [1, 3],
        **KINDS.get(model_type, {}),
    }  # fmt: skip
    known = AutoConfig.for_model(model_type)
    made = AutoConfig.for_model(model_type, **{name: value for name, value in {**sizes, **changes}.items() if hasattr(known, name)})
    if getattr(made, "layer_types", None) and getattr(made, "sliding_window", None) and not anatomy.family_of(model_type).plain:
        made.layer_types = [("sliding_attention", "full_attention")[i % 2] for i in range(LAYERS)]  # both kinds, whatever the period
    return made


def build(model_type: str, seed: int = 0, attention: str | None = None, **changes: Any) -> nn.Module:
    """A fresh model in float32 and evaluation mode with frozen weights. attention: 'eager' | 'sdpa' | None = the family's own."""
    from transformers import AutoModelForCausalLM

    chosen = {} if attention is None else {"attn_implementation": attention}
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # some norms and time steps begin at random
        model = AutoModelForCausalLM.from_config(config(model_type, **changes), dtype=torch.float32, **chosen)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            # matrices keep the scale of the stream; norms and biases move off their start, so that leaving one out is seen
            parameter.copy_(noise / max(parameter.shape[-1], 1) ** 0.5 if parameter.ndim > 1 else parameter + 0.2 * noise)
    return model.eval().requires_grad_(False)


@cache
def model(model_type: str, attention: str | None = None) -> nn.Module:
    """The family's shared model. Tests hand it back unchanged (test_suffix.py holds the package to that)."""
    return build(model_type, attention=attention)


def known(model_type: str) -> bool:
    """Whether this transformers has the family."""
    from transformers import CONFIG_MAPPING

    return model_type in CONFIG_MAPPING


EVERY = tuple(name for name in FAMILIES if known(name))
# those that differ most from each other, in every combination; test_families.py has the contract of the rest
_DEEP = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt2", "gpt_neox")
FAMILY_NAMES = counts.count(_DEEP, ("mistral", "qwen2", "gemma2", "gemma3_text", "gpt2"))
# form x read point; a form that reads nothing has one entry
READS: tuple[tuple[str, str | None], ...] = tuple(
    (form, read_point) for form in FORMS for read_point in (COMPONENTS if INTERVENTIONS[form].reads else (None,))
)
PLACES = {"first": 0, "middle": LAYERS // 2, "last": LAYERS - 1}


def reads_of(family: str) -> tuple[tuple[str, str | None], ...]:
    """READS; without CI=true every third for a family, so that three families that follow each other show them all."""
    shown = READS if counts.CI else READS[(*FAMILY_NAMES, *EVERY).index(family) % 3 :: 3]
    return tuple(read for read in shown if read[1] in (None, *anatomy.read_widths(model(family), LAYERS // 2)))


def has_down_proj(family: str) -> bool:
    """Whether 'mlp_mid' is there: not among experts."""
    return anatomy.of(model(family)).parts[0].mlp_mid is not None


def intervention(
    form: str,
    read_point: str | None = None,
    hidden: int = HIDDEN,
    width: int | None = None,
    *,
    seed: int = 0,
    scale: float = 0.3,
    **more: Any,
) -> Intervention:
    """A form with every parameter random and not small, as a fitted one has. width: F, by default that of the read point."""
    if read_point is None and INTERVENTIONS[form].reads:
        read_point = COMPONENTS[0]
    width = width or (MIDDLE if read_point == "mlp_mid" else hidden)
    made = INTERVENTIONS[form](hidden, width, read_point=read_point, **more)
    generator = torch.Generator().manual_seed(1000 + seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return made.eval()


def token_rows(lengths: list[int], seed: int = 0, pad: int = PAD) -> tuple[Tensor, Tensor]:
    """Random token ids [B, T], padded on the right, and which are real [B, T]."""
    generator = torch.Generator().manual_seed(seed)
    real = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    ids = torch.randint(len(SPECIAL), VOCAB, real.shape, generator=generator)
    return torch.where(real, ids, torch.full_like(ids, pad)), real


# ---------------------------------------------------------------- tokenizers


# newline, ASCII and then Latin letters: every id that a model can choose is a character of its own, so texts tell ids apart
ALPHABET = ("\n", *map(chr, range(0x20, 0x7F)), *(chr(c) for c in range(0xC0, 0x300)))[: VOCAB - len(SPECIAL)]


def tokenizer(template: str | None = TEMPLATE, bos: bool = True) -> Any:
    """One token a character, plus the special ones; with or without chat template and BOS."""
    from tokenizers import Tokenizer, decoders, models, processors
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*SPECIAL, *ALPHABET])}, merges=[]))
    raw.decoder = decoders.Fuse()
    raw.add_special_tokens(list(SPECIAL))
    if bos:
        raw.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<bos>" if bos else None,
        eos_token="<eos>",
        additional_special_tokens=["<turn>", "<end>"],
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = template
    return made


# ---------------------------------------------------------------- a base folder


class Base(NamedTuple):
    """A complete small base_dir. `one`: a dataset of pairs; `many`: one with concepts; `model`: the checkpoint's name."""

    path: Path
    model: str = "tiny"
    one: str = "mine"
    many: str = "axbench"
    layer: int = 2

    @property
    def experiment(self) -> Path:
        return self.path / "hparams" / "Steer" / "experiment_hparams" / "spilt_experiment"

    def hparams(self, dataset: str, method: str, name: str) -> Path:
        return self.experiment / dataset / self.model / method / name

    def data(self, dataset: str, section: str) -> Path:
        return self.path / "data" / dataset / f"{section}.jsonl"

    def argv(self, method: str = "sft", form: str = "vector", *more: str, dataset: str = "", model: str = "") -> list[str]:
        words = ["--dataset", dataset or self.one, "--method", method, "--model_name", model or self.model]
        return [*words, "--intervention_method", form, "--device", "cpu", "--base_dir", str(self.path), *more]


PAIRS = tuple(plan.pairs_of("all", "all")[0])
CONCEPTS = {0: "rivers", 1: "lamps", 3: "bread"}
_made: dict[str, Path] = {}


def checkpoint(model_type: str = "qwen2") -> Path:
    """A saved model with its tokenizer, made once per process."""
    if model_type not in _made:
        folder = Path(tempfile.mkdtemp(prefix="spilt-tests-")) / model_type
        build(model_type).save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        _made[model_type] = folder
    return _made[model_type]


def pairs(count: int, word: str = "") -> list[dict[str, Any]]:
    """Questions of differing lengths, each with a winning and a losing answer."""
    return [
        {"question": f"{word}{'so ' * (i % 3)}is {i} odd?", "matching": f" yes{'!' * (i % 2)}", "not_matching": f" not {i}"}
        for i in range(count)
    ]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_yaml(path: Path, values: dict[str, Any]) -> None:
    import yaml

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def make_base(root: Path, model_type: str = "qwen2", train: int = 20, test: int = 3) -> Base:
    """Model, tokenizer, data (a dataset of pairs, one with concepts) and hparams of all methods x forms below `root`."""
    shutil.copytree(_base(model_type, train, test), root, dirs_exist_ok=True)
    return Base(root)


@cache
def _base(model_type: str, train: int, test: int) -> Path:
    """Written once per process."""
    root = Path(tempfile.mkdtemp(prefix="spilt-tests-")) / "base"
    base = Base(root)
    shutil.copytree(checkpoint(model_type), root / "models" / base.model)
    own = {"question": "question", "matching": "matching", "not_matching": "not_matching"}
    for section, count in (("train", train), ("valid", test)):
        write_jsonl(base.data(base.one, section), pairs(count))
        rows = [
            {**row, "input": row["question"], "output_concept": concept, "concept_id": i, "category": "positive"}
            for i, concept in CONCEPTS.items()
            for row in pairs(4 if section == "train" else 2, f"{concept} ")
        ]
        negative = {**pairs(1)[0], "input": "x", "output_concept": "none", "concept_id": -1, "category": "negative"}
        write_jsonl(base.data(base.many, section), [*rows, negative])
    generation = {"input": "question", "reference_response": "matching"}
    formats: dict[str, Any] = {
        section: {
            name: {"file_path": f"data/{name}/{section}.jsonl", "field_names": own, "multi_concept": name == base.many}
            for name in (base.one, base.many)
        }
        for section in ("train", "valid")
    }
    formats["generation"] = {
        base.one: {"file_path": f"data/{base.one}/valid.jsonl", "field_names": generation},
        base.many: {"file_path": f"data/{base.many}/valid.jsonl", "field_names": {**generation, "input": "input"}, "multi_concept": True},
    }
    write_yaml(root / "hparams" / "Steer" / "dataset_format.yaml", formats)
    common = {"torch_dtype": "float32", "seed": 42, "use_chat_template": True, "system_prompt": ""}
    write_yaml(base.experiment / "config.yaml", common)
    texts = {"generation_params": {"max_new_tokens": 5, "do_sample": False}, "num_responses": 1, "generate_orig_output": False}
    write_yaml(base.experiment / "apply_config.yaml", {**common, **texts})
    for dataset in (base.one, base.many):
        for method, form in PAIRS:
            cell = {"alg_name": method, "layers": [base.layer], "intervention_method": form}
            loop = {"batch_size": 4, "gradient_accumulation_steps": 2, "n_epochs": 1, "lr": "1e-2", "low_rank_dimension": 4}
            write_yaml(base.hparams(dataset, method, f"generate_{method}_{form}.yaml"), {**cell, **(loop if METHODS[method].loss else {})})
        for method in dict(PAIRS):
            write_yaml(base.hparams(dataset, method, f"apply_{method}.yaml"), {"alg_name": method, "layers": [base.layer]})
        write_yaml(base.hparams(dataset, "sft", "generate_sft_loss.yaml"), {"alg_name": "sft", "layers": [base.layer], "batch_size": 1})
    return root


def listing(root: Path) -> dict[str, str]:
    """Every file below a folder with the hash of its bytes, every folder as such: equal listings are equal trees."""
    found = {}
    for path in sorted(root.rglob("*")):
        found[str(path.relative_to(root))] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
    return found
