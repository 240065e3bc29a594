"""Data: dataset_format.yaml -> pairs and prompts -> token sequences -> padded batches.

`sources` (files), `readers` (pairs and prompts) and `chat` (tokenizer) load no torch and no transformers, so that a dry run starts at once;
`spilt.data.batches` needs torch and is imported by its own name.
"""

from spilt.data.chat import Chat, Encoded
from spilt.data.readers import DatasetFormat, Pair, Prompt, concepts, dataset_format, load_formats, read_pairs, read_prompts
from spilt.data.sources import file_hash
