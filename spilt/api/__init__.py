"""The Python face: `import spilt` gives these functions. No global side effects: threads, seeds, log levels stay the caller's.

model, tokenizer = spilt.load("models/my-model")
steering = spilt.fit(model, tokenizer, pairs, layer=14, method="spilt", intervention="vector")
with spilt.steer(model, steering, 2.0):
    model.generate(...)
"""

from spilt.api.fitting import fit
from spilt.api.given import frozen
from spilt.api.measuring import WORST, both_sides, calibrate, divergence, divergences, measure, reach
from spilt.api.models import in_place, load, read_adapter, read_post_block, steer
from spilt.api.texts import generate, new_tokens, token_stream
