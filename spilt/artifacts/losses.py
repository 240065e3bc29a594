"""Files of losses, and what is made of them: names and columns."""

from __future__ import annotations

# all multipliers of a cell and split in one table, measured as text is made (`positions`: which tokens were steered)
NEUTRAL = "neutral"  # text that has nothing to do with the trait: one answer to each prompt
TABLES = {"train": "losses_train.csv", "test": "losses_test.csv", NEUTRAL: "losses_neutral.csv"}
PROMPTS = {"train": "prompt_train.csv", "test": "prompt_test.csv"}  # of the unsteered model behind a prompt, columns as TABLE
# dose: mean of |delta| / |h| over tokens at the steered blocks. One row per multiplier, example and answer (target)
TABLE = ("multiplier", "dose", "positions", "example", "target", "n_tokens", "loss_sum", "answer_tokens", "answer_loss_sum")
TARGETS = ("matching", "not_matching")
NEUTRAL_TARGET = "text"
# the released files: a folder for each multiplier and preference type, in the released positions
PREFERENCE_TYPES = ("winning_only", "losing_only")
SPLITS = {"train": "train_losses.csv", "test": "test_losses.csv"}
# the released columns; then ours: which question and answer a row is, its tokens and summed losses, with and without the suffix
LOSS, APPLIED = "pos_steer_loss", "pos_steering_factors"
RELEASED = ("epoch", "step", LOSS, APPLIED, "neg_steering_factors")
COLUMNS = (*RELEASED, "example", "pair", "target", "n_tokens", "loss_sum", "answer_tokens", "answer_loss_sum")
# control_texts.csv: share of answers that show the behaviour at the recommended dose; draw -1 is the stored intervention
CONTROL_TEXTS = ("draw", "multiplier", "score", "n")
# kl.csv: of each side the multiplier of equal KL, then all that was tried
KL_COLUMNS = ("side", "multiplier", "status", "tokens", "kl_mean", "kl_p95", "kl_max", "budget")
TRIED = "tried"  # status of a row at which no search ended
# preference_utility.csv: averages over questions per split and multiplier
SUMMARY_FILE = "preference_utility.csv"
SUMMARY = (
    *("split", "multiplier", "preference", "preference_low", "preference_high", "utility", "utility_low", "utility_high"),
    *("n", "n_undefined", "loss_matching", "loss_not_matching", "accuracy"),
    *("gain_low", "gain_high", "drop_low", "drop_high"),
    *("answer_mass", "moved_wrong", "dose", "neutral_loss", "utility_pooled"),
)
# control.csv: means over the first questions along random interventions of the same form, in units of the stored one's output norm
CONTROL = (
    *("split", "draw", "multiplier", "dose", "preference", "utility", "loss_matching", "loss_not_matching"),
    *("n", "n_undefined"),
)
