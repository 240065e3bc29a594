"""Losses of one multiplier and preference type (train_losses.csv, test_losses.csv), and what is made of them: names and columns."""

from __future__ import annotations

PREFERENCE_TYPES = ("winning_only", "losing_only")
SPLITS = {"train": "train_losses.csv", "test": "test_losses.csv"}
# the released columns; then ours: which question and answer a row is, its tokens and summed losses, with and without the suffix
LOSS, APPLIED = "pos_steer_loss", "pos_steering_factors"
RELEASED = ("epoch", "step", LOSS, APPLIED, "neg_steering_factors")
COLUMNS = (*RELEASED, "example", "pair", "target", "n_tokens", "loss_sum", "answer_tokens", "answer_loss_sum")
# preference_utility.csv: averages over questions per split and multiplier
SUMMARY_FILE = "preference_utility.csv"
SUMMARY = (
    *("split", "multiplier", "preference", "preference_low", "preference_high", "utility", "utility_low", "utility_high"),
    *("n", "n_undefined", "loss_matching", "loss_not_matching", "accuracy"),
    *("gain_low", "gain_high", "drop_low", "drop_high"),
    *("answer_mass", "moved_wrong", "dose", "neutral_loss", "utility_pooled"),
)
# control.csv: the same along random directions of the stored vector's norm
CONTROL = ("split", "draw", "multiplier", "preference", "utility", "n", "n_undefined")
