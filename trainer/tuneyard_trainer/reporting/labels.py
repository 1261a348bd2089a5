"""The labels of metrics, for tables and sentences."""

from __future__ import annotations

ANSWER_METRICS = {
    "exactMatch": "Exact match",
    "tokenF1": "F1 of words",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "bleu": "BLEU",
    "chrf": "chrF",
    "jsonValid": "Valid JSON",
    "schemaValid": "JSON of the schema",
    "patternMatch": "Pattern found",
    "classAccuracy": "Class accuracy",
    "macroF1": "Macro F1 of classes",
    "numericMatch": "Equal numbers",
}
"""Labels of the metrics of answers, of which higher is better."""
ALIGNMENT_METRICS = {
    "Preference accuracy": "preferenceAccuracy",
    "Reward": "reward",
    "Independent reward": "independentReward",
    "Reward model accuracy": "rewardAccuracy",
    "Win rate by the judge": "winRate",
    "Win rate at equal length": "lengthControlledWinRate",
}
"""Metrics of which higher is better, by label."""
REWARDS = ("reward", "independentReward")
"""Those that are compared with the start model's, and not with 0.5."""
REWARD_HACKING_SIGNS = {
    "KL divergence (nats per completion)": "kl",
    "Correlation of reward and length": "rewardLengthCorrelation",
    "Length relative to the start model": "lengthRatio",
    "Distinct word pairs": "distinct",
    "Repeated word sequences": "repetition",
    "Completions that ended": "complete",
    "Sycophancy shift": "sycophancyShift",
}
"""Metrics that show reward hacking, by label. Neither direction is better in itself."""
LOSS_METRICS = {
    "validationLoss": "Held-out loss (nats per token)",
    "validationPerplexity": "Held-out perplexity",
}
"""Labels of the losses of held-out rows, of which lower is better."""
POINTS = ("bleu", "chrf")
"""Metrics from 0 to 100, which are not shown in percent."""
