"""What the fork server of forked.py imports before it forks."""

import gc

import families
import pandas  # noqa: F401
import peft  # noqa: F401
import scipy.optimize  # noqa: F401
import torch
import torch._dynamo  # an optimizer imports it
import transformers.conversion_mapping  # noqa: F401
import transformers.models.qwen2.modeling_qwen2  # noqa: F401

import spilt.cli
import spilt.report
import spilt.tasks.fit
import spilt.tasks.generate
import spilt.tasks.measure  # noqa: F401
from spilt.model import template

torch.set_num_threads(1)
template.look(families.TEMPLATE, families.tokenizer().special_tokens_map)  # known to every fork, which would ask a process of its own
gc.collect()
gc.freeze()  # a collection in a fork would copy all of it
