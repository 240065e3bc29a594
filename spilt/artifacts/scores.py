"""Files of scores: columns, and what is measured. One file per cell and multiplier, a row per text (or question) and measure."""

from __future__ import annotations

# concept: 0 for a dataset without; item: 0-based, of the results file's prompts (accuracy, log_odds: of the held-out pairs;
# neutral_loss: of the neutral texts); response: which of several to a prompt. Without a value there is a reason
TABLE = ("multiplier", "concept", "item", "response", "measure", "value", "reason")
UNPARSABLE = "no rating in the judge's reply"
ALONG = ("perplexity", "kl_mean", "kl_p95")  # of a text, by the model
CHOICE = ("accuracy", "log_odds", "accuracy_text")  # of answers of one word
NEUTRAL_LOSS, HARMONIC = "neutral_loss", "harmonic"
HEADLINES = ("accuracy", "power", "concept", HARMONIC)  # what the paper's main table has of its three datasets
# what a measure is, in tables; a rubric's has its own name
MEASURES = {
    "accuracy": "held-out questions whose matching answer's first token is likelier than the other's",
    "log_odds": "log p(first token of the matching answer) - log p(that of the other), nats",
    "accuracy_text": "stored texts that begin with the matching answer, of those that begin with either",
    HARMONIC: "harmonic mean of concept, instruction and fluency of each text, 0 if any is 0",
    "perplexity": "of the text under the unsteered model",
    "kl_mean": "KL(steered || unsteered) in nats, mean over the text's tokens",
    "kl_p95": "the same, 95th percentile over the text's tokens",
    NEUTRAL_LOSS: "of neutral texts under the steered model, nats per token",
    "distinct_1": "different words of all words of a text",
    "distinct_2": "the same of pairs of words",
    "distinct_3": "the same of three words",
    "repetition": "of a text's runs of four words, those that stood there before",
    "length": "words",
    "refusal": "texts that begin as refusals do",
    "empty": "texts without a word",
}
