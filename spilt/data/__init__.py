"""Data: dataset_format.yaml -> pairs and prompts -> token sequences -> padded batches.

`readers` (files) and `chat` (tokenizer) load no torch and no transformers, so that a dry run starts at once;
`spilt.data.batches` needs torch and is imported by its own name.
"""

from spilt.data.chat import Chat, Sequence
from spilt.data.readers import DatasetFormat, Pair, Prompt, concepts, dataset_format, file_hash, load_formats, read_pairs, read_prompts

__all__ = [
    "Chat",
    "DatasetFormat",
    "Pair",
    "Prompt",
    "Sequence",
    "concepts",
    "dataset_format",
    "file_hash",
    "load_formats",
    "read_pairs",
    "read_prompts",
]
