"""llama.cpp as a second engine, where its library and the gguf package are: a checkpoint as GGUF in float32, and its logits."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

WHY = "pip install xllamacpp gguf: llama.cpp itself, and what reads and writes its files"
POINTER = ctypes.c_void_p


class ModelParams(ctypes.Structure):
    """llama_model_params of llama.h, handed on as it comes; more room than it takes."""

    _fields_ = [("room", ctypes.c_int64 * 64)]


class ContextParams(ctypes.Structure):
    """llama_context_params of llama.h up to the types of the cache; the rest is handed on as it comes."""

    _fields_ = [
        *((name, ctypes.c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq", "n_outputs", "n_outputs_seq")),
        *((name, ctypes.c_int32) for name in ("n_threads", "n_threads_batch", "ctx", "rope", "pooling", "attention", "flash_attn_type")),
        *((name, ctypes.c_float) for name in ("base", "scale", "yarn_ext", "yarn_attn", "yarn_fast", "yarn_slow")),
        *(("yarn_ctx", ctypes.c_uint32), ("defrag", ctypes.c_float), ("cb_eval", POINTER), ("cb_data", POINTER)),
        *(("type_k", ctypes.c_int), ("type_v", ctypes.c_int), ("room", ctypes.c_int64 * 32)),
    ]


class Batch(ctypes.Structure):
    """llama_batch of llama.h."""

    _fields_ = [
        *(("n_tokens", ctypes.c_int32), ("token", ctypes.POINTER(ctypes.c_int32)), ("embd", POINTER)),
        *(("pos", ctypes.POINTER(ctypes.c_int32)), ("n_seq_id", ctypes.POINTER(ctypes.c_int32))),
        *(("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))), ("logits", ctypes.POINTER(ctypes.c_int8))),
    ]


def libraries() -> tuple[Any, Any]:
    """(gguf, the C functions of llama.cpp in xllamacpp's binary), or the test is skipped."""
    gguf = pytest.importorskip("gguf", reason=WHY)
    package = pytest.importorskip("xllamacpp", reason=WHY)
    lib = ctypes.CDLL(str(next(Path(package.__file__).parent.glob("*.so"))))
    given: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "llama_model_default_params": (ModelParams, ()),
        "llama_context_default_params": (ContextParams, ()),
        "llama_model_load_from_file": (POINTER, (ctypes.c_char_p, ModelParams)),
        "llama_init_from_model": (POINTER, (POINTER, ContextParams)),
        "llama_adapter_lora_init": (POINTER, (POINTER, ctypes.c_char_p)),
        "llama_set_adapters_lora": (ctypes.c_int32, (POINTER, POINTER, ctypes.c_size_t, POINTER)),
        "llama_set_adapter_cvec": (ctypes.c_int32, (POINTER, POINTER, ctypes.c_size_t, *[ctypes.c_int32] * 3)),
        "llama_batch_init": (Batch, (ctypes.c_int32,) * 3),
        "llama_decode": (ctypes.c_int32, (POINTER, Batch)),
        "llama_get_memory": (POINTER, (POINTER,)),
        "llama_memory_clear": (None, (POINTER, ctypes.c_bool)),
        "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), (POINTER, ctypes.c_int32)),
        "llama_model_get_vocab": (POINTER, (POINTER,)),
        "llama_vocab_n_tokens": (ctypes.c_int32, (POINTER,)),
        "llama_model_n_layer": (ctypes.c_int32, (POINTER,)),
        "llama_batch_free": (None, (Batch,)),
        "llama_free": (None, (POINTER,)),
        "llama_model_free": (None, (POINTER,)),
        "llama_log_set": (None, (POINTER, POINTER)),
    }
    for name, (result, arguments) in given.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    how = lib.llama_context_default_params()
    if (how.n_ctx, how.n_batch, how.flash_attn_type, how.type_k, how.type_v) != (512, 2048, -1, 1, 1):
        pytest.skip("llama.h has changed: its context parameters do not lie where this test looks for them")
    return gguf, lib


def write(model: Any, path: Path) -> Path:
    """llama or qwen2 as convert_hf_to_gguf.py lays it out, without a tokenizer: llama's rotary pairs lie side by side in q and k."""
    gguf, _ = libraries()
    config = model.config
    arch = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[config.model_type]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(shared)
    rope = getattr(config, "rope_parameters", None) or {"rope_theta": config.rope_theta}
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("no_vocab")
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = value.detach().float().numpy()
        if config.model_type == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            count = heads if "q_proj" in name else shared
            array = array.reshape(count, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class Engine:
    """A loaded model, with what `--control-vector` and `--lora` give llama.cpp's programs."""

    def __init__(self, path: Path, vector: Path | None = None, lora: Path | None = None) -> None:
        self.gguf, self.lib = libraries()
        self.quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, POINTER)(lambda *_: None)
        self.lib.llama_log_set(ctypes.cast(self.quiet, POINTER), None)
        self.lib.llama_backend_init()
        self.model = self.lib.llama_model_load_from_file(str(path).encode(), self.lib.llama_model_default_params())
        assert self.model, f"llama.cpp does not load {path}"
        how = self.lib.llama_context_default_params()
        how.n_ctx = how.n_batch = how.n_ubatch = 256
        how.n_threads = how.n_threads_batch = 1
        how.type_k = how.type_v = how.flash_attn_type = 0  # a cache in float32, which flash attention has not
        self.context = self.lib.llama_init_from_model(self.model, how)
        assert self.context
        if vector is not None:
            self._control_vector(vector)
        if lora is not None:
            adapter = self.lib.llama_adapter_lora_init(self.model, str(lora).encode())
            assert adapter, f"llama.cpp does not load {lora}"
            assert self.lib.llama_set_adapters_lora(self.context, (POINTER * 1)(adapter), 1, (ctypes.c_float * 1)(1.0)) == 0

    def _control_vector(self, path: Path) -> None:
        """As common_control_vector_load does: `direction.{layer}`, float32, at (layer - 1) D; layer 0 is an error."""
        tensors = {int(tensor.name.removeprefix("direction.")): tensor.data for tensor in self.gguf.GGUFReader(path).tensors}
        size, blocks = len(next(iter(tensors.values()))), self.lib.llama_model_n_layer(self.model)
        rows = np.zeros((blocks, size), np.float32)
        for layer, data in tensors.items():
            assert layer > 0 and data.dtype == np.float32 and data.shape == (size,)
            rows[layer - 1] = data
        assert self.lib.llama_set_adapter_cvec(self.context, rows.ctypes.data, rows.size, size, 1, blocks) == 0

    def logits(self, ids: list[int]) -> torch.Tensor:
        """[T, vocabulary]."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        batch = self.lib.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
            batch.seq_id[i][0] = 0
        assert self.lib.llama_decode(self.context, batch) == 0
        width = self.lib.llama_vocab_n_tokens(self.lib.llama_model_get_vocab(self.model))
        rows = [np.ctypeslib.as_array(self.lib.llama_get_logits_ith(self.context, i), (width,)).copy() for i in range(len(ids))]
        self.lib.llama_batch_free(batch)
        return torch.from_numpy(np.stack(rows))

    def text(self, ids: list[int], count: int) -> list[int]:
        """`count` more tokens, each the most likely one."""
        start = len(ids)
        for _ in range(count):
            ids = [*ids, int(self.logits(ids)[-1].argmax())]
        return ids[start:]

    def close(self) -> None:
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)
