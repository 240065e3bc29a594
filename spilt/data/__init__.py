"""Data: dataset_format.yaml -> pairs and prompts -> token sequences -> padded batches.

`sources` (files), `entries` (dataset_format.yaml), `readers` (pairs and prompts) and `chat` (tokenizer) load no torch and no transformers,
so that a dry run starts at once; `spilt.data.batches` needs torch and is imported by its own name.
"""

from spilt.data.chat import Chat, Encoded
from spilt.data.entries import DatasetFormat, dataset_format, load_formats
from spilt.data.readers import Pair, Prompt, concepts, read_pairs, read_prompts
from spilt.data.sources import file_hash
